from calidrop.parts import Full, method


@method("the uncompressed cache")
def full() -> Full:
    """Everything exact: what the others are compared with."""
    return Full()
