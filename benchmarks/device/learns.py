def run(stage): pass
def find_cifar10(x): return None
