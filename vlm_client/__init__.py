"""A critic of pictures over HTTP: any endpoint that speaks the OpenAI chat protocol and takes pictures, such as Qwen2-VL.

    boxes.py      which scale a model's boxes have, and how they become fractions
    critique.py   what is asked, what a reply may be, and the plan that it becomes
    client.py     HTTP: tries, deadline, ledger
    measuring.py  a critic that needs no weights: a small server of the same protocol that measures

It knows nothing of FLUX and imports none of our packages.
"""


class VlmError(ValueError):
    """One line in three parts, lower case start: what came, what was expected, what to do. Never holds a key."""
