from calidrop.methods._per_token import PerToken
from calidrop.parts import Layer, Storage, check_choice, check_int, method
from calidrop.quant import whole_bytes
from calidrop.store import Store


@method("Hadamard int4 per token: QuaRot, arXiv 2404.00456")
def int4(rotate: bool = True, residual: int | None = None) -> Storage:
    """QuaRot's cache format (Ashkboos et al., arXiv 2404.00456, sec. 4.2): 4-bit integers per token and head after a
    Hadamard rotation of the head's channels, asymmetric.

    Keys are rotated as cached (after the rotary embedding), values too; the rotation is undone when they are read.
    rotate: False is plain round-to-nearest per token. residual: the last tokens that stay exact (32 when None) if no
    evictor decides that. Bytes per token and head, D channels: 2 * (D / 2 + 4).

    Deviations: the paper clips at 0.95 of the range and fuses the value rotation into the weights; neither is done.
    Head dims that are no power of two are rotated in blocks of the largest that divides them.
    """
    check_choice("int4: rotate", rotate, (True, False))
    if residual is not None:
        check_int("int4: residual", residual, 0)
    recent = 32 if residual is None else residual

    def make(layer: Layer) -> Store:
        if not whole_bytes(layer.head_dim, 4) or not whole_bytes(layer.value_dim, 4):
            raise ValueError(f"int4: head_dim must be even, got {layer.head_dim}")
        return PerToken(4, rotate)

    return Storage(make, recent, 16, chose_recent=residual is not None, latents=True)
