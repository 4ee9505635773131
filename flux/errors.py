"""The one error that is the user's to mend."""


class UserError(ValueError):
    """One line in three parts, lower case start: what came, what was expected, what to do.

    Raised at the edge (flags, files, checkpoints, images). The commands print it and exit with code 2;
    a programmer may catch it as the ValueError it is.
    """
