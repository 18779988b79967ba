def batch_sheet(batch, names, path): pass
def report(run): pass
