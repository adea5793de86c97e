from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcompose.adapter import (
    CONFIG_FILE,
    MAX_SCALE,
    WEIGHTS_FILE,
    Adapter,
    check_adapter,
    module_of,
    parse_adapter,
    parse_config,
    read_adapter,
    tensor_name,
    write_adapter,
)
from fedcompose.bases import Base, base_shapes
from fedcompose.errors import RefusedError
from fedcompose.files import READ_CHUNK_BYTES
from fedcompose.tensors import StoredTensor, canonical_safetensors, parse_safetensors
from tests.federation_sim import make_random_expert

MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def peft_folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_expert(tiny_base, tmp_path_factory.mktemp("expert") / "expert", target_modules=MLP)


@pytest.fixture(scope="module")
def shapes(tiny_base: Path) -> dict[str, tuple[int, int]]:
    return dict(base_shapes(Base("tiny", tiny_base, "")))


def logits(base: Path, expert: Path) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), expert)
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def code(call: Callable[[], object]) -> str:
    with pytest.raises(RefusedError) as refusal:
        call()
    return refusal.value.code


def test_names_of_tensors_have_no_room_for_anything_else() -> None:
    assert module_of(tensor_name("model.layers.0.mlp.up_proj", "A")) == "model.layers.0.mlp.up_proj"
    for module in ("model.\x1b[2J.up_proj", "../up_proj", "model layers.up_proj", ".up_proj", "up_proj\n", "é.up_proj"):
        assert code(lambda module=module: module_of(tensor_name(module, "A"))) == "ADAPTER_TENSORS"  # type: ignore[misc]


@pytest.mark.parametrize("with_base", [True, False])
def test_every_target_is_a_module_that_is_there(
    peft_folder: Path, shapes: dict[str, tuple[int, int]], with_base: bool
) -> None:
    config = json.loads((peft_folder / CONFIG_FILE).read_bytes())
    weights = (peft_folder / WEIGHTS_FILE).read_bytes()
    known = shapes if with_base else None
    assert parse_adapter(json.dumps(config).encode(), weights, known)
    config["target_modules"] = [*config["target_modules"], "nowhere"]
    assert code(lambda: parse_adapter(json.dumps(config).encode(), weights, known)) == "ADAPTER_TENSORS"


def test_the_largest_scale_is_accepted_and_no_larger_one() -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2 * MAX_SCALE, "target_modules": ["up_proj"]}
    assert parse_config(json.dumps(config).encode()).lora_alpha == 2 * MAX_SCALE
    for change in ({"lora_alpha": 2 * MAX_SCALE + 1}, {"rank_pattern": {"up_proj": 1}}):
        assert code(lambda change=change: parse_config(json.dumps(config | change).encode())) == "ADAPTER_INVALID"  # type: ignore[misc]


def test_reads_what_peft_writes_and_peft_loads_what_we_write(
    tiny_base: Path, peft_folder: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    import torch

    adapter = read_adapter(peft_folder, shapes)
    assert len(adapter.modules()) == 6
    write_adapter(tmp_path, adapter)
    before, after = logits(tiny_base, peft_folder), logits(tiny_base, tmp_path)
    assert torch.equal(before, after)
    other = make_random_expert(tiny_base, tmp_path / "other", seed=99, target_modules=MLP)
    assert not torch.equal(before, logits(tiny_base, other))


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "target_modules": [*MLP, "q_proj", "o_proj"], "use_rslora": True},
        {"r": 4, "target_modules": MLP, "rank_pattern": {"layers.1.mlp.up_proj": 7, "up_proj": 3}},
        {"r": 4, "target_modules": ["layers.0.mlp.up_proj"], "alpha_pattern": {"up_proj": 5.5}},
    ],
)
def test_ranks_patterns_and_scales_mean_what_they_mean_to_peft(
    tiny_base: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path, options: dict[str, Any]
) -> None:
    import torch

    folder = make_random_expert(tiny_base, tmp_path / "peft", **options)
    adapter = read_adapter(folder, shapes)
    write_adapter(tmp_path / "ours", adapter)
    assert torch.equal(logits(tiny_base, folder), logits(tiny_base, tmp_path / "ours"))
    written = read_adapter(tmp_path / "ours", shapes)
    assert [written.config.scale(m) for m in written.modules()] == [adapter.config.scale(m) for m in adapter.modules()]


def test_writing_twice_gives_the_same_bytes_and_no_trace_of_the_machine(
    tiny_base: Path, peft_folder: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    assert str(tiny_base) in (peft_folder / CONFIG_FILE).read_text()
    write_adapter(tmp_path / "a", read_adapter(peft_folder, shapes))
    write_adapter(tmp_path / "b", read_adapter(tmp_path / "a", shapes))
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        first = (tmp_path / "a" / name).read_bytes()
        assert first == (tmp_path / "b" / name).read_bytes()
        assert str(tiny_base).encode() not in first


def test_half_precision_survives_bit_for_bit(
    shapes: dict[str, tuple[int, int]], tiny_base: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    folder = make_random_expert(tiny_base, tmp_path / "bf16", target_modules=MLP, dtype="bfloat16")
    adapter = read_adapter(folder, shapes)
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {"BF16"}
    write_adapter(tmp_path / "ours", adapter)
    theirs, ours = load_file(folder / WEIGHTS_FILE), load_file(tmp_path / "ours" / WEIGHTS_FILE)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs) and theirs.keys() == ours.keys()
    name = next(iter(theirs))
    assert torch.equal(torch.from_numpy(adapter.tensors[name].float32().copy()), theirs[name].float())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_dora": True}, "ADAPTER_UNSUPPORTED"),
        ({"modules_to_save": ["lm_head"]}, "ADAPTER_UNSUPPORTED"),
        ({"bias": "all"}, "ADAPTER_UNSUPPORTED"),
        ({"lora_bias": True}, "ADAPTER_UNSUPPORTED"),
        ({"init_lora_weights": "pissa"}, "ADAPTER_UNSUPPORTED"),
        ({"init_lora_weights": 1}, "ADAPTER_UNSUPPORTED"),
        ({"kasa_config": {}}, "ADAPTER_UNSUPPORTED"),
        ({"corda_config": {"cache_file": "/x"}}, "ADAPTER_UNSUPPORTED"),
        ({"layer_replication": [[0, 150]]}, "ADAPTER_UNSUPPORTED"),
        ({"exclude_modules": "([a-z_.0-9]+)+X"}, "ADAPTER_UNSUPPORTED"),
        ({"alora_invocation_tokens": [1]}, "ADAPTER_UNSUPPORTED"),
        ({"trainable_token_indices": [1]}, "ADAPTER_UNSUPPORTED"),
        ({"target_parameters": ["mlp.experts"]}, "ADAPTER_UNSUPPORTED"),
        ({"auto_mapping": {"base_model_class": "X"}}, "ADAPTER_UNSUPPORTED"),
        ({"megatron_core": "antigravity"}, "ADAPTER_UNSUPPORTED"),
        ({"runtime_config": {}}, "ADAPTER_UNSUPPORTED"),
        ({"brand_new_switch": None}, "ADAPTER_UNSUPPORTED"),
        ({"peft_type": "XLORA"}, "ADAPTER_UNSUPPORTED"),
        ({"peft_type": ["LORA"]}, "ADAPTER_UNSUPPORTED"),
        ({"target_modules": "([a-z_.0-9]+)+X"}, "ADAPTER_INVALID"),
        ({"target_modules": ["([a-z_.0-9]+)+X"]}, "ADAPTER_INVALID"),
        ({"target_modules": ["up_proj\n"]}, "ADAPTER_INVALID"),
        ({"target_modules": []}, "ADAPTER_INVALID"),
        ({"rank_pattern": {"([a-z_.0-9]+)+X": 4}}, "ADAPTER_INVALID"),
        ({"rank_pattern": {"up_proj": 30_000_000}}, "ADAPTER_INVALID"),
        ({"r": 1_000_000_000}, "ADAPTER_INVALID"),
        ({"r": 0}, "ADAPTER_INVALID"),
        ({"r": True}, "ADAPTER_INVALID"),
        ({"lora_alpha": 1e30}, "ADAPTER_INVALID"),
        ({"lora_alpha": 4096}, "ADAPTER_INVALID"),
        ({"lora_alpha": "8"}, "ADAPTER_INVALID"),
        ({"alpha_pattern": {"up_proj": 1e9}}, "ADAPTER_INVALID"),
    ],
)
def test_refuses_every_switch_that_is_not_off(peft_folder: Path, changes: dict[str, Any], expected: str) -> None:
    config = json.loads((peft_folder / CONFIG_FILE).read_bytes())
    assert parse_config(json.dumps(config).encode()).r == 4
    assert code(lambda: parse_config(json.dumps(config | changes).encode())) == expected


def test_a_nan_alpha_does_not_parse(peft_folder: Path) -> None:
    text = (peft_folder / CONFIG_FILE).read_text().replace('"lora_alpha": 8', '"lora_alpha": NaN')
    assert code(lambda: parse_config(text.encode())) == "JSON_INVALID"


def file_of(header: str | dict[str, Any], body: bytes = b"") -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
TWICE = f"{{{ONE},{ONE}}}"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "SAFETENSORS_INVALID"),
        (b"\x80\x04pickle bytes, not weights", "SAFETENSORS_INVALID"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "SAFETENSORS_INVALID"),
        (file_of("{}"), "SAFETENSORS_INVALID"),
        (file_of(" {}"), "SAFETENSORS_INVALID"),
        (file_of(TWICE, bytes(4)), "JSON_INVALID"),
        (file_of({"a": entry(0, 4, [1])}, bytes(3)), "SAFETENSORS_INVALID"),
        (file_of({"a": entry(0, 4, [1])}, bytes(5)), "SAFETENSORS_INVALID"),
        (file_of({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, bytes(4)), "SAFETENSORS_INVALID"),
        (file_of({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)), "SAFETENSORS_INVALID"),
        (file_of({"a": entry(0, 4, [2])}, bytes(4)), "SAFETENSORS_INVALID"),
        (file_of({"a": entry(0, 0, [0, 1 << 39])}), "SAFETENSORS_INVALID"),
        (file_of({"a": entry(0, 4, [-1, -1])}, bytes(4)), "SAFETENSORS_INVALID"),
        (file_of({"a": entry(0, 8, [1], "I64")}, bytes(8)), "SAFETENSORS_INVALID"),
        (file_of({"a": entry(0, 4, [True])}, bytes(4)), "SAFETENSORS_INVALID"),
        (file_of({"a": entry(0, 4, [1]) | {"note": "x"}}, bytes(4)), "SAFETENSORS_INVALID"),
        (file_of({"a": [0, 4]}, bytes(4)), "SAFETENSORS_INVALID"),
        (file_of({"a": entry(0, 4, [1]), "__metadata__": {"who": "me"}}, bytes(4)), "SAFETENSORS_INVALID"),
        (file_of({str(i): entry(i, i, [1]) for i in range(4097)}), "SAFETENSORS_INVALID"),
    ],
)
def test_refuses_malformed_weights(data: bytes, expected: str) -> None:
    assert parse_safetensors(file_of({"a": entry(0, 4, [1])}, bytes(4)))["a"].shape == (1,)
    assert code(lambda: parse_safetensors(data)) == expected


def damaged(adapter: Adapter, change: Callable[[dict[str, StoredTensor]], None]) -> bytes:
    tensors = dict(adapter.tensors)
    change(tensors)
    return canonical_safetensors(tensors)


A0 = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


def tensor(shape: tuple[int, ...], bits: bytes, dtype: str = "F32") -> StoredTensor:
    count = 1
    for size in shape:
        count *= size
    return StoredTensor(dtype, shape, memoryview(bits * count))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda t: t.update({"base_model.model.lm_head.weight": tensor((2, 2), bytes(4))}),
            "ADAPTER_TENSORS",
        ),
        (
            lambda t: t.update(
                {"base_model.model.model.layers.0.mlp.up_proj.base_layer.weight": tensor((64, 32), bytes(4))}
            ),
            "ADAPTER_TENSORS",
        ),
        (lambda t: t.update({A0.replace("up_proj", "../x"): tensor((4, 32), bytes(4))}), "ADAPTER_TENSORS"),
        (lambda t: t.pop(A0), "ADAPTER_TENSORS"),
        (lambda t: t.update({A0: tensor((5, 32), bytes(4))}), "ADAPTER_TENSORS"),
        (lambda t: t.update({A0: tensor((128,), bytes(4))}), "ADAPTER_TENSORS"),
        (lambda t: t.update({A0: tensor((4, 32), b"\0\0\xc0\x7f")}), "ADAPTER_NOT_FINITE"),
        (lambda t: t.update({A0: tensor((4, 32), b"\x80\xff", "BF16")}), "ADAPTER_NOT_FINITE"),
        (lambda t: t.update({A0: tensor((4, 32), b"\x00\x7c", "F16")}), "ADAPTER_NOT_FINITE"),
        (lambda t: t.update({A0: tensor((4, 32), b"\0\0\x80\x4b")}), "ADAPTER_TOO_STRONG"),
        (lambda t: t.update({A0: tensor((4, 32), b"\xff\xff\x7f\x7f")}), "ADAPTER_TOO_STRONG"),
    ],
    ids=["lm_head", "base_layer", "path", "missing", "rank", "flat", "nan", "bf16 -inf", "f16 inf", "huge", "largest"],
)
@pytest.mark.parametrize("with_base", [True, False])
def test_refuses_tensors_the_configuration_does_not_imply(
    peft_folder: Path,
    shapes: dict[str, tuple[int, int]],
    change: Callable[[dict[str, StoredTensor]], None],
    expected: str,
    with_base: bool,
) -> None:
    adapter = read_adapter(peft_folder, shapes)
    config = (peft_folder / CONFIG_FILE).read_bytes()
    known = shapes if with_base else None
    parse_adapter(config, damaged(adapter, lambda tensors: None), known)
    assert code(lambda: parse_adapter(config, damaged(adapter, change), known)) == expected


def test_refuses_modules_and_shapes_the_base_does_not_have(
    peft_folder: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    wider = {name: (2 * out, into) for name, (out, into) in shapes.items()}
    fewer = {name: shape for name, shape in shapes.items() if ".0." in name}
    more = shapes | {"model.layers.2.mlp.up_proj": (64, 32)}
    for base in (wider, fewer, more):
        assert code(lambda base=base: read_adapter(peft_folder, base)) == "ADAPTER_TENSORS"  # type: ignore[misc]


def test_refuses_an_adapter_on_an_embedding(peft_folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
    module, (rows, columns) = "model.embed_tokens", shapes["model.embed_tokens"]
    config = json.loads((peft_folder / CONFIG_FILE).read_bytes()) | {"target_modules": ["embed_tokens"]}
    weights = canonical_safetensors(
        {
            f"base_model.model.{module}.lora_A.weight": tensor((4, columns), bytes(4)),
            f"base_model.model.{module}.lora_B.weight": tensor((rows, 4), bytes(4)),
        }
    )
    assert code(lambda: parse_adapter(json.dumps(config).encode(), weights, shapes)) == "ADAPTER_TENSORS"


def test_refuses_a_linked_file(peft_folder: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes((peft_folder / CONFIG_FILE).read_bytes())
    (tmp_path / WEIGHTS_FILE).symlink_to(peft_folder / WEIGHTS_FILE)
    assert code(lambda: read_adapter(tmp_path, shapes)) == "FILE_NOT_REGULAR"


def test_weights_are_read_once_in_pieces() -> None:
    """So that what is checked is what was hashed on the way, and a file of any size takes the same memory."""
    module, wide = "model.layers.0.mlp.up_proj", 1 << 20
    weights = canonical_safetensors(
        {
            f"base_model.model.{module}.lora_A.weight": tensor((2, wide), bytes(4)),
            f"base_model.model.{module}.lora_B.weight": tensor((3, 2), bytes(4)),
        }
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    stream, sizes = io.BytesIO(weights), []

    class Reader:
        def read(self, size: int, /) -> bytes:
            sizes.append(size)
            return stream.read(size)

    check_adapter(json.dumps(config).encode(), Reader(), len(weights), None)
    assert sum(sizes) == len(weights)
    assert max(sizes) <= READ_CHUNK_BYTES
    cut = io.BytesIO(weights[:-READ_CHUNK_BYTES])  # the file was larger when it was opened
    assert code(lambda: check_adapter(json.dumps(config).encode(), cut, len(weights), None)) == "SAFETENSORS_INVALID"
