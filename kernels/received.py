def received(*args, **kwargs):
    raise NotImplementedError
