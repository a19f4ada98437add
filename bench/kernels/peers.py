"""Fused losses of other projects, called as their documentation does.

A peer is imported only when it runs. `unavailable` gives the reason why it cannot run here: not
installed, or another device is needed. `lacks` lists what `paint_loss` does and the peer does not.
Products are counted in the sources of Liger 0.8.5, TRL 1.16.0, fla 0.6.0, cut-cross-entropy 25.1.1
and quack 0.6.5, for a frozen head.
"""

# pyright: reportMissingImports=false
# The peers are optional.

import functools
import importlib.util

import torch
from torch import Tensor

from bench.kernels.variants import Variant
from bench.losses import (
    FORWARD_KL,
    JSD,
    LOGPROBS,
    Inputs,
    Loss,
    Objective,
    gradients,
)

NO_PAINT = ("clip", "selection", "interpolation", "token losses")
WIDE = "float32 logits of bfloat16 states"
LIGER_LACKS = (*NO_PAINT, "entropies")
LIGER_CHUNKED_LACKS = (*LIGER_LACKS, WIDE, "frozen head without its gradient's cost")
FLA_LACKS = (*LIGER_LACKS, WIDE, "temperature", "reverse KL, JSD")
TRL_LACKS = (*NO_PAINT, "teacher's entropy")
LOGPROB_LACKS = ("distillation", "entropies", "temperature")
CCE_COMPILE_LACKS = (*LOGPROB_LACKS, "memory below the full logits")


def liger_fused_jsd_loss(inputs: Inputs, beta: float) -> Tensor:
    """Computes Liger's loss, whose beta selects the divergence: 0 is KL(teacher, student), 0.5 the
    JSD."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=beta)
    return loss(inputs.student, inputs.weight, inputs.teacher, inputs.weight, None)


@functools.lru_cache
def liger_chunked_jsd(beta: float, compiled: bool) -> torch.nn.Module:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled
    )


def liger_chunked_jsd_loss(inputs: Inputs, beta: float, compiled: bool) -> Tensor:
    loss = liger_chunked_jsd(beta, compiled)
    return loss(inputs.student, inputs.weight, inputs.teacher, inputs.weight, inputs.token_ids)


def trl_chunked_loss(inputs: Inputs, beta: float) -> Tensor:
    """Computes the loss of TRL's DistillationTrainer. It computes the logits again in the backward
    pass, and for the JSD in a second forward pass too."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    roles = (inputs.student, inputs.weight, None, inputs.teacher, inputs.weight.detach(), None)
    result = ChunkedDivergenceFunction.apply(*roles, beta)
    assert result is not None
    return result[0].mean()


def fla_kl_loss(inputs: Inputs) -> Tensor:
    from fla.modules.fused_kl_div import FusedKLDivLoss

    return FusedKLDivLoss()(inputs.student, inputs.teacher, inputs.weight, inputs.weight.detach())


def cce_loss(inputs: Inputs, implementation: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(
        inputs.student, inputs.weight, inputs.token_ids, impl=implementation
    )


def quack_loss(inputs: Inputs) -> Tensor:
    from quack.linear_cross_entropy import (
        chunked_linear_cross_entropy,
    )

    return chunked_linear_cross_entropy(inputs.student, inputs.weight, inputs.token_ids)


def reason_against(package: str, distribution: str, needed: str, device: torch.device) -> str:
    """Returns why a peer cannot run here; empty if it can. `needed` is "any", "gpu" or "sm90"."""
    if importlib.util.find_spec(package) is None:
        return f"not installed (pip install {distribution})"
    if needed != "any" and device.type != "cuda":
        return "needs a GPU"
    if needed == "sm90" and torch.cuda.get_device_capability(device)[0] < 9:
        return "needs compute capability 9.0 or above"
    return ""


def peer(
    name: str,
    objective: Objective,
    loss: Loss,
    lacks: tuple[str, ...],
    unavailable: str,
    extra_products: int = 0,
) -> Variant:
    group = {FORWARD_KL: "forward KL", JSD: "JSD", LOGPROBS: "log-probabilities"}[objective]
    run = functools.partial(gradients, loss)
    return Variant(
        group, name, run, objective, "peer", lacks, unavailable, extra_products=extra_products
    )


def peers(device: torch.device) -> list[Variant]:
    liger_gpu = reason_against("liger_kernel", "liger-kernel", "gpu", device)
    liger = reason_against("liger_kernel", "liger-kernel", "any", device)
    trl = reason_against("trl", "trl", "any", device)
    fla = reason_against("fla", "flash-linear-attention", "gpu", device)
    cce = reason_against("cut_cross_entropy", "cut-cross-entropy", "any", device)
    cce_gpu = reason_against("cut_cross_entropy", "cut-cross-entropy", "gpu", device)
    quack = reason_against("quack", "quack-kernels", "sm90", device)
    found = []
    for objective, beta in ((FORWARD_KL, 0.0), (JSD, 0.5)):
        fused = functools.partial(liger_fused_jsd_loss, beta=beta)
        found.append(peer("Liger fused linear JSD", objective, fused, LIGER_LACKS, liger_gpu))
        for name, compiled in (("", False), (", compiled", True)):
            chunked = functools.partial(liger_chunked_jsd_loss, beta=beta, compiled=compiled)
            name = f"Liger chunked JSD{name}"
            # It computes the gradient of a frozen head too.
            found.append(peer(name, objective, chunked, LIGER_CHUNKED_LACKS, liger, 1))
        in_tiles = functools.partial(trl_chunked_loss, beta=beta)
        again = 2 if objective == FORWARD_KL else 4
        found.append(peer("TRL chunked divergence", objective, in_tiles, TRL_LACKS, trl, again))
    found.append(peer("fla fused KL", FORWARD_KL, fla_kl_loss, FLA_LACKS, fla))
    cce_fused = functools.partial(cce_loss, implementation="cce")
    cce_compiled = functools.partial(cce_loss, implementation="torch_compile")
    filtered = (*LOGPROB_LACKS, "gradients under its filter")
    # It computes the logits again in the backward pass.
    found.append(peer("cut-cross-entropy", LOGPROBS, cce_fused, filtered, cce_gpu, 1))
    name = "cut-cross-entropy, torch_compile"
    found.append(peer(name, LOGPROBS, cce_compiled, CCE_COMPILE_LACKS, cce))
    quack_lacks = (*LOGPROB_LACKS, "token log-probabilities")
    found.append(peer("quack", LOGPROBS, quack_loss, quack_lacks, quack))
    return found
