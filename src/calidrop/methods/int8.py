from calidrop.methods._per_token import PerToken
from calidrop.parts import Storage, check_int, method


@method("per-token int8, as engines ship it")
def int8(residual: int | None = None) -> Storage:
    """8-bit integers per token and head, as in vLLM's int8_per_token_head: asymmetric, one fp16 scale and zero each for
    key and value.

    residual: the last tokens that stay exact (32 when None) if no evictor decides that. Bytes per token and head, D
    channels: 2 * (D + 4).
    """
    if residual is not None:
        check_int("int8: residual", residual, 0)
    recent = 32 if residual is None else residual
    return Storage(lambda layer: PerToken(8, False), recent, 16, chose_recent=residual is not None, latents=True)
