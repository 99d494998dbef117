"""LoRAs: every layout against the same change made in the weights, on for a while and off again, what is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from unrolled.core.errors import BadInput, BadModel
from unrolled.core.loading import Model, Shelf
from unrolled.core.lora import LowRank, lora
from unrolled.stages.text import encode_text

TOLERANCE = 2e-5
Write = Callable[..., dict[str, dict[str, Tensor]]]
PARTS = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture
def own(request: pytest.FixtureRequest) -> Model:
    """A tiny model by its fixture's name, with networks of the test's own."""
    model: Model = request.getfixturevalue(getattr(request, "param", "tiny"))
    return replace(model, **{part: copy.deepcopy(getattr(model, part)) for part in PARTS})


def merged(model: Model, *added: dict[str, dict[str, Tensor]]) -> Model:
    """The same model with changes made in its weights."""
    model = replace(model, **{part: copy.deepcopy(getattr(model, part)) for part in PARTS})
    for changes in added:
        for part, layers in changes.items():
            for layer, change in layers.items():
                getattr(model, part).get_submodule(layer).weight.data += change
    return model


def seen(model: Model) -> Iterator[Tensor]:
    """What a model's networks make of fixed inputs."""
    draw = torch.Generator().manual_seed(1)
    if model.text_encoder is not None or model.text_encoder_2 is not None:
        text = encode_text(model, "a castle by the sea")
        yield from (t for t in (text.context, text.pooled) if t is not None)
    config = model.unet.config
    given: dict[str, Any] = {"encoder_hidden_states": None}
    if config.encoder_hid_dim_type is None:
        given = {"encoder_hidden_states": torch.randn(2, 77, config.cross_attention_dim, generator=draw)}
    if config.addition_embed_type == "text_time":
        ids = 5 if model.scored else 6
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        text_time = {"text_embeds": torch.randn(2, pooled, generator=draw), "time_ids": torch.full((2, ids), 64.0)}
        given["added_cond_kwargs"] = text_time
    if config.addition_embed_type == "image":
        given["added_cond_kwargs"] = {"image_embeds": torch.randn(2, config.encoder_hid_dim, generator=draw)}
    if config.num_class_embeds:
        given["class_labels"] = torch.tensor([3, 3])
    if config.time_cond_proj_dim:
        given["timestep_cond"] = torch.randn(2, config.time_cond_proj_dim, generator=draw)
    with torch.no_grad():
        out = model.unet(torch.randn(2, config.in_channels, 16, 16, generator=draw), 400, **given).sample
    yield out  # not in there: two of these that run in turn would leave gradients off


def off(a: Model, b: Model) -> float:
    """How far two models are from each other, as a part of the largest number."""
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(seen(a), seen(b), strict=True))


def state(model: Model) -> dict[str, Any]:
    """Every module and weight by identity."""
    networks = {part: getattr(model, part) for part in PARTS if getattr(model, part) is not None}
    found: dict[str, Any] = {f"{part}.{n}": id(m) for part, net in networks.items() for n, m in net.named_modules()}
    return found | {f"{part}.{n}": (id(p), p.data_ptr(), p._version)
                    for part, net in networks.items() for n, p in net.named_parameters()}  # fmt: skip


ATTENTION = r"attn\w*\.(to|\w_proj|out_proj)"


def parts_of(model: Model) -> tuple[str, ...]:
    return tuple(part for part in PARTS if getattr(model, part) is not None)


@pytest.mark.parametrize("own", ["tiny", "tiny_sdxl", "tiny_refiner"], indirect=True)
@pytest.mark.parametrize(
    ("layout", "layers"),
    [("diffusers", ""), ("diffusers-old", ATTENTION), ("peft", ""), ("kohya", ""), ("kohya-ldm", "")],
)
def test_every_layout(own: Model, layout: str, layers: str, write_lora: Write, tmp_path: Path) -> None:
    """With alphas of their own for every layer, where the layout has them."""
    alpha = (lambda rank: 1.0 + rank) if layout.startswith("kohya") else None
    file = tmp_path / "a.safetensors"
    added = write_lora(file, own, layout, layers=layers, parts=parts_of(own), alpha=alpha)
    wanted, before = merged(own, added), state(own)
    assert off(wanted, own) > 0.01
    with lora(own, file):
        assert off(own, wanted) < TOLERANCE
    assert state(own) == before


@pytest.mark.parametrize("own", ["tiny_kandinsky", "tiny_x2", "tiny_x4", "tiny_inpaint"], indirect=True)
def test_every_system_with_a_unet(own: Model, write_lora: Write, tmp_path: Path) -> None:
    """Every layer of it, as diffusers loads none of these but by the UNet's own ``load_lora_adapter``."""
    added = write_lora(tmp_path / "a.safetensors", own, "peft", parts=parts_of(own))
    wanted = merged(own, added)
    assert off(wanted, own) > 0.01
    with lora(own, tmp_path / "a.safetensors"):
        assert off(own, wanted) < TOLERANCE


def test_several_add_up_by_their_weights(own: Model, write_lora: Write, tmp_path: Path) -> None:
    before, added = state(own), list[Any]()
    for number, weight in enumerate((0.7, -0.4)):
        one = write_lora(tmp_path / f"{number}.safetensors", own, "peft", parts=parts_of(own), seed=number)
        added.append({part: {name: weight * change for name, change in of.items()} for part, of in one.items()})
    both, first = merged(own, *added), merged(own, added[0])
    with lora(own, tmp_path / "0.safetensors", 0.7):
        with lora(own, tmp_path / "1.safetensors", weight=-0.4):
            assert off(own, both) < TOLERANCE
        assert off(own, first) < TOLERANCE
        with lora(own, tmp_path / "0.safetensors", -0.7):
            assert off(own, merged(first, {p: {n: -c for n, c in of.items()} for p, of in added[0].items()})) < 1e-3
    assert state(own) == before


def test_off_again_after_a_fault(own: Model, write_lora: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lora(tmp_path / "a.safetensors", own, parts=parts_of(own))
    before = state(own)
    with pytest.raises(KeyboardInterrupt), lora(own, tmp_path / "a.safetensors"):
        raise KeyboardInterrupt
    assert state(own) == before
    made, plain = list[Any](), LowRank.__init__

    def run_out(self: Any, *given: Any) -> None:
        made.append(plain(self, *given))
        if len(made) == 50:
            raise MemoryError

    monkeypatch.setattr(LowRank, "__init__", run_out)
    with pytest.raises(MemoryError), lora(own, tmp_path / "a.safetensors"):
        pass
    assert len(made) == 50
    assert state(own) == before


@pytest.mark.parametrize("offload", ["resident", "model", "layer"])
def test_wherever_the_networks_live(offload: Any, tiny: Model, tiny_folder: Path, write_lora: Write, tmp_path: Path) -> None:
    added = write_lora(tmp_path / "a.safetensors", tiny, parts=parts_of(tiny))
    model = Shelf(device="cpu", offload=offload).load(str(tiny_folder))
    plain = list(seen(model))
    with lora(model, tmp_path / "a.safetensors"):
        assert off(model, merged(tiny, added)) < TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(seen(model), plain, strict=True))


def test_in_half_precision(tiny_folder: Path, tiny: Model, write_lora: Write, tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", tiny, parts=("unet",))
    model = Shelf(device="cpu", dtype=torch.bfloat16).load(str(tiny_folder))
    with lora(model, tmp_path / "a.safetensors"):
        layer = model.unet.get_submodule("conv_in")
        assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.bfloat16}
        assert layer.weight is layer.base.weight


def test_alphas_of_pefts_config(own: Model, write_lora: Write, tmp_path: Path) -> None:
    """The commonest alpha, another for layers by the end of their names, and one by its whole name."""
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    added = write_lora(file, own, "peft-own", parts=("unet",), layers="to_q|conv1")["unet"]
    whole = "down_blocks.1.resnets.0.conv1"
    config.write_text(json.dumps({"lora_alpha": 3, "alpha_pattern": {"conv1": 1, f"^{whole}": 5}}))
    ranks = {name: 2 + number % 2 for number, name in enumerate(added)}
    alphas = {name: 5 if name == whole else 1 if name.endswith("conv1") else 3 for name in added}
    scaled = {name: change * alphas[name] / ranks[name] for name, change in added.items()}
    wanted = merged(own, {"unet": scaled})
    with lora(own, file):
        assert off(own, wanted) < TOLERANCE
    config.unlink()
    says = re.escape(f"{file} lacks its adapter_config.json, in which PEFT says how strong it is: put that beside it.")
    with pytest.raises(BadModel, match=says), lora(own, file):
        pass


def test_pefts_files_of_a_text_encoder(own: Model, write_lora: Write, tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    added = write_lora(file, own, "peft-own", parts=("text_encoder",))
    (tmp_path / "adapter_config.json").write_text("{}")
    wanted = merged(own, added)
    with lora(own, file):
        assert off(own, wanted) < TOLERANCE


# --- what is refused


def refused(model: Model, file: Path, says: str, kind: type[Exception] = BadModel, weight: float = 1.0) -> None:
    before = state(model)
    with pytest.raises(kind) as caught, lora(model, file, weight):
        pass
    assert str(caught.value) == says
    assert state(model) == before


@pytest.mark.parametrize("layout", ["peft", "kohya", "kohya-ldm"])
def test_one_for_another_model(layout: str, own: Model, tiny_sdxl: Model, write_lora: Write, tmp_path: Path) -> None:
    file = tmp_path / "xl.safetensors"
    write_lora(file, tiny_sdxl, layout, layers="attn2.to_(k|v)$")
    first = {"peft": "unet.", "kohya": "lora_unet_", "kohya-ldm": "unet."}[layout]
    with pytest.raises(BadModel) as caught, lora(own, file):
        pass
    said = str(caught.value)
    assert said.startswith(f"{file} does not fit {own.name}: ")
    assert re.search(
        rf": \d+ of the \d+ layers that it changes are not there or of another shape, {first}\S+ to begin with; ", said
    )
    assert said.endswith("; it was trained on a UNet that is told text of width 80, and this one is told 32.")


def test_one_of_sdxl_is_called_so(own: Model, tmp_path: Path) -> None:
    name = "lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.zeros(4, 2048), f"{name}.lora_up.weight": torch.zeros(64, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    refused(
        own,
        tmp_path / "a.safetensors",
        f"{tmp_path / 'a.safetensors'} does not fit {own.name}: 1 of the 1 layers that it changes are not there or of "
        f"another shape, {name} to begin with; it was trained on a UNet that is told text of width 2048, which SDXL's base "
        "has, and this one is told 32.",
    )


def test_one_layer_too_many(own: Model, write_lora: Write, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_lora(file, own, parts=("unet",), layers="to_q$")
    more = {"unet.nowhere.lora_A.weight": torch.zeros(1, 4), "unet.nowhere.lora_B.weight": torch.zeros(4, 1)}
    tensors = load_file(file)
    save_file(tensors | more, file)
    refused(
        own,
        file,
        f"{file} does not fit {own.name}: 1 of the {len(tensors) // 2 + 1} layers that it changes are not there or of "
        "another shape, unet.nowhere to begin with; take one that was trained on this model or its relatives.",
    )


def test_what_is_no_plain_lora(own: Model, write_lora: Write, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_lora(file, own, "kohya", parts=("unet",), layers="conv_in")
    tensors = load_file(file)
    for key in ("lora_unet_conv_in.dora_scale", "lora_unet_conv_in.hada_w1_a", "lora_unet_conv_in.diff"):
        save_file(tensors | {key: torch.zeros(4)}, file)
        refused(
            own,
            file,
            f"{file} is no plain LoRA: it holds {key}, and pairs of lora_down and lora_up (or lora_A and lora_B) with their "
            "alpha are read, while DoRA, LoHa, LoKr and whole layers are not.",
        )
    down = {key: tensor for key, tensor in tensors.items() if "down" in key}
    save_file(down, file)
    refused(own, file, f"{file} is damaged: of lora_unet_conv_in it has down alone.")
    save_file({"lora_unet_input_blocks_one.lora_down.weight": torch.zeros(1, 4)}, file)
    with pytest.raises(BadModel, match="cannot be read: its layers are named in a way that is not known"), lora(own, file):
        pass


def test_alphas_that_make_no_sense(own: Model, write_lora: Write, tmp_path: Path) -> None:
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    write_lora(file, own, "peft-own", parts=("unet",), layers="conv_in")
    name = "base_model.model.conv_in"
    config.write_text(json.dumps({"lora_alpha": "many"}))
    refused(own, file, f"{file} is damaged: the alpha of {name} is 'many', its rank 2.")
    config.write_text(json.dumps({"alpha_pattern": {"conv.*": 2}}))
    refused(own, file, f"{file} gives alphas by the pattern 'conv.*': only names of layers are read.")
    for text in ("[]", "{"):
        save_file({"unet.conv_in.lora_A.weight": torch.zeros(1)}, file, {"lora_adapter_metadata": text})
        with pytest.raises(BadModel, match="is damaged"), lora(own, file):
            pass


def test_other_files(own: Model, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    refused(own, file, f"There is no file {file}: give the path of a LoRA.")
    file.write_bytes(b"nothing")
    with pytest.raises(BadModel, match="is damaged and cannot be read as safetensors"), lora(own, file):
        pass
    pickle = tmp_path / "a.pt"
    torch.save({}, pickle)
    refused(own, pickle, f"{pickle} is no .safetensors file, and LoRAs are read from no other: convert it.")


def test_other_weights_and_models(own: Model, tiny_prior: Any, write_lora: Write, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_lora(file, own, parts=("unet",), layers="conv_in")
    says = f"The weight of {file} must be a finite number, got nan."
    refused(own, file, says, BadInput, float("nan"))
    says = f"{tiny_prior.name} has no UNet, which a LoRA is for: give a model that makes pictures."
    with pytest.raises(BadInput, match=re.escape(says)), lora(tiny_prior, file):
        pass
