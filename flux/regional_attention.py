def velocity(*a): raise NotImplementedError
