from calidrop.methods._per_token import Float8
from calidrop.parts import Storage, check_int, method


@method("per-token fp8 (e4m3), as engines ship it")
def fp8(residual: int | None = None) -> Storage:
    """8-bit floats per token and head, as in vLLM's fp8_per_token_head: e4m3, one fp16 scale each for key and value.

    residual: the last tokens that stay exact (32 when None) if no evictor decides that. Bytes per token and head, D
    channels: 2 * (D + 2).
    """
    if residual is not None:
        check_int("fp8: residual", residual, 0)
    recent = 32 if residual is None else residual
    return Storage(lambda layer: Float8(1), recent, 16, chose_recent=residual is not None, latents=True)
