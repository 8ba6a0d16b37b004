import contextlib
def Warming(run, order): return contextlib.nullcontext()
