"""How far int8 weights lead the language models away from bfloat16, on the same inputs."""

from pathlib import Path

import torch

from app.backends.tts.voxcpm.engine.loading import LoadedModel, load_model

TOKENS = list(range(200, 232))


def quantization_error(checkpoint: Path) -> dict[str, float]:
    """Relative error and cosine of both hidden states after reading a prompt."""
    states = [
        _hidden(load_model(checkpoint, device="cpu", dtype="bfloat16", quantize=quantize))
        for quantize in (False, True)
    ]
    report = {}
    for name, exact, rounded in zip(("base", "residual"), *states, strict=True):
        error = (rounded - exact).norm() / exact.norm()
        report[f"{name}_relative_error"] = round(error.item(), 4)
        cosine = torch.nn.functional.cosine_similarity(exact, rounded, dim=0)
        report[f"{name}_cosine"] = round(cosine.item(), 5)
    return report


def _hidden(model: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    network = model.network
    nothing = torch.zeros(0, network.patch_size, network.features)
    with torch.inference_mode():
        reading = network.read([(network.embed_text(TOKENS), False)], nothing)
        for _ in reading.chunks():
            pass
    return reading.state.base_hidden.float(), reading.state.residual_hidden.float()
