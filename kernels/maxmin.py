def maxmin(*args, **kwargs):
    raise NotImplementedError
