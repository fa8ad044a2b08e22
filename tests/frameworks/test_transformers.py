"""transformers' RT-DETR, RT-DETR v2 and D-FINE, through `Distiller(recipe="transformers")`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from readme import code_after
from torch import Tensor

from frs_kernels import Distiller, fsr_loss, masks

MODELS = {
    "RT-DETR": ("RTDetrForObjectDetection", "RTDetrConfig"),
    "RT-DETR v2": ("RTDetrV2ForObjectDetection", "RTDetrV2Config"),
    "D-FINE": ("DFineForObjectDetection", "DFineConfig"),
}
each_model = pytest.mark.parametrize("name", MODELS)
QUERIES = 20


def make(name: str, width: int, labels: int = 5) -> Any:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    model, config = (getattr(transformers, kind) for kind in MODELS[name])
    return model(config(
        backbone_config=backbone, encoder_hidden_dim=width, encoder_in_channels=[16, 32, 64], d_model=width,
        encoder_ffn_dim=32, encoder_attention_heads=2, encoder_layers=1, decoder_in_channels=[width] * 3,
        decoder_ffn_dim=32, decoder_attention_heads=2, decoder_layers=2, num_queries=QUERIES, num_denoising=5,
        num_labels=labels,
    ))  # fmt: skip


def batch() -> dict[str, Any]:
    labels = [{"class_labels": torch.tensor([1, 2]), "boxes": 0.2 + 0.3 * torch.rand(2, 4)} for _ in range(2)]
    return {"pixel_values": torch.rand(2, 3, 96, 128), "labels": labels}


def best(z: list[Tensor]) -> list[Tensor]:
    return masks.top_k(masks.richness(z), QUERIES)


@each_model
def test_a_step(name):
    d = Distiller(make(name, 16), make(name, 24), recipe="transformers", mask=best, warmup=0, feat_weight=1.0)
    inputs = batch()
    outputs, loss = d(**inputs), d.loss()
    assert [x.shape[2:] for x in map(torch.Tensor.unsqueeze, d.terms.mask, (1, 1, 1))] == [(12, 16), (6, 8), (3, 4)]
    with torch.no_grad():
        found = d.teacher(pixel_values=inputs["pixel_values"])
    z, begin = [], 0
    for h, w in ((12, 16), (6, 8), (3, 4)):
        z.append(found.enc_outputs_class[:, begin : begin + h * w].transpose(1, 2).unflatten(2, (h, w)))
        begin += h * w
    right = fsr_loss(None, None, z, z, mask=best(z), return_terms=True)
    assert torch.allclose(d.terms.mass, right.mass, rtol=1e-5)
    (outputs.loss + loss).backward()
    assert not [name for name, p in d.named_parameters() if p.requires_grad and p.grad is None]
    make(name, 16).load_state_dict(d.student.state_dict())


@each_model
def test_the_teacher_runs_no_decoder(name):
    d = Distiller(make(name, 16), make(name, 24), recipe="transformers", warmup=0, feat_weight=1.0)
    ran = []
    d.teacher.model.decoder.register_forward_hook(lambda *_: ran.append(1))
    d(**batch())
    assert not ran


def test_the_step_of_the_readme_runs():
    inputs = batch()
    names: dict[str, Any] = {
        "Distiller": Distiller, "masks": masks, "student": make("RT-DETR", 16), "teacher": make("RT-DETR", 24),
        "images": inputs["pixel_values"], "labels": inputs["labels"],
    }  # fmt: skip
    exec(code_after("**transformers**"), names)
    names["loss"].backward()
    assert all(p.grad is not None for p in names["distiller"].adapter.parameters())


def test_another_model_is_refused():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    with pytest.raises(ValueError, match="ResNetModel is no RT-DETR or D-FINE of transformers with its head"):
        Distiller(transformers.ResNetModel(config), make("RT-DETR", 16), recipe="transformers")
