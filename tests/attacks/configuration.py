"""Attacks by `adapter_config.json`: PEFT's switches that would run code, read files or change the base. Signed."""

from __future__ import annotations

from typing import Any

from tests.attacks.attack import Cases, Contribution, Mutation, with_signed_file

CONFIG = "adapter_config.json"
REGEX = "([a-z_.0-9]+)+X"  # tried on a long name, it takes longer than anybody waits


def configured(**changes: Any) -> Mutation:
    def mutate(attack: Contribution) -> None:
        attack.edit(CONFIG, lambda config: config.update(changes))
        attack.sign()

    return mutate


def without(key: str) -> Mutation:
    def mutate(attack: Contribution) -> None:
        attack.edit(CONFIG, lambda config: config.pop(key) and None)
        attack.sign()

    return mutate


def text(old: bytes, new: bytes) -> Mutation:
    def mutate(attack: Contribution) -> None:
        attack.rewrite(CONFIG, lambda data: data.replace(old, new, 1))
        attack.sign()

    return mutate


def another_name(attack: Contribution) -> None:
    """Only a pickle, which PEFT would open when it finds no safetensors file."""
    attack.path("adapter_model.safetensors").rename(attack.path("adapter_model.bin"))


OFF, BAD = "ADAPTER_UNSUPPORTED", "ADAPTER_INVALID"
CONFIGURATION: Cases = {
    "peft-type-xlora": (configured(peft_type="XLORA"), OFF),
    "peft-type-shadow": (configured(peft_type="SHADOW", shadow_model="evil/model"), OFF),
    "peft-type-prompt": (configured(peft_type="PROMPT_TUNING", tokenizer_name_or_path="evil/tokenizer"), OFF),
    "peft-type-absent": (without("peft_type"), OFF),
    "peft-type-list": (configured(peft_type=["LORA"]), OFF),
    "peft-unknown-key": (configured(brand_new_switch=None), OFF),
    "peft-runtime-config": (configured(runtime_config={}), OFF),
    "peft-auto-mapping": (configured(auto_mapping={"base_model_class": "X", "parent_library": "os"}), OFF),
    "peft-megatron": (configured(megatron_core="antigravity", megatron_config={}), OFF),
    "peft-init-pissa": (configured(init_lora_weights="pissa"), OFF),
    "peft-init-olora": (configured(init_lora_weights="olora"), OFF),
    "peft-init-corda": (configured(init_lora_weights="corda"), OFF),
    "peft-init-loftq": (configured(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), OFF),
    "peft-init-one": (configured(init_lora_weights=1), OFF),
    "peft-kasa": (configured(kasa_config={}), OFF),
    "peft-corda-file": (configured(corda_config={"cache_file": "/etc/passwd"}), OFF),
    "peft-corda-covariance": (configured(corda_config={"covariance_file": "cov.pt"}), OFF),
    "peft-modules-to-save": (configured(modules_to_save=["lm_head"]), OFF),
    "peft-layer-replication": (configured(layer_replication=[[0, 150]]), OFF),
    "peft-layers": (configured(layers_to_transform=[0], layers_pattern="layers"), OFF),
    "peft-trigger-tokens": (configured(alora_invocation_tokens=[1]), OFF),
    "peft-target-parameters": (configured(target_parameters=["mlp.experts"]), OFF),
    "peft-trainable-tokens": (configured(trainable_token_indices=[1]), OFF),
    "peft-dora": (configured(use_dora=True), OFF),
    "peft-bdlora": (configured(use_bdlora=True), OFF),
    "peft-qalora": (configured(use_qalora=True), OFF),
    "peft-arrow": (configured(arrow_config={}), OFF),
    "peft-eva": (configured(eva_config={}), OFF),
    "peft-velora": (configured(velora_config={}), OFF),
    "peft-monteclora": (configured(monteclora_config={}), OFF),
    "peft-lora-bias": (configured(lora_bias=True), OFF),
    "peft-bias": (configured(bias="all"), OFF),
    "peft-fan-in-fan-out": (configured(fan_in_fan_out=True), OFF),
    "regex-in-exclude-modules": (configured(exclude_modules=REGEX), OFF),
    "regex-in-target-modules": (configured(target_modules=REGEX), BAD),
    "regex-in-a-list": (configured(target_modules=[REGEX]), BAD),
    "regex-in-rank-pattern": (configured(rank_pattern={REGEX: 4}), BAD),
    "regex-in-alpha-pattern": (configured(alpha_pattern={REGEX: 4}), BAD),
    "target-with-a-line-end": (configured(target_modules=["up_proj\n"]), BAD),
    "target-nothing": (configured(target_modules=[]), BAD),
    "target-an-embedding": (configured(target_modules=["embed_tokens"]), "ADAPTER_TENSORS"),
    "target-that-is-not-there": (configured(target_modules=["up_proj", "no_proj"]), "ADAPTER_TENSORS"),
    "rank-of-a-billion": (configured(r=1_000_000_000), BAD),
    "rank-in-a-pattern": (configured(rank_pattern={"up_proj": 30_000_000}), BAD),
    "rank-of-zero": (configured(r=0), BAD),
    "rank-of-truth": (configured(r=True), BAD),
    "alpha-of-1e30": (configured(lora_alpha=1e30), BAD),
    "alpha-too-large-for-the-rank": (configured(lora_alpha=4096), BAD),
    "alpha-in-a-pattern": (configured(alpha_pattern={"up_proj": 1e9}), BAD),
    "alpha-nan": (text(b'"lora_alpha": 8', b'"lora_alpha": NaN'), "JSON_INVALID"),
    "configuration-key-twice": (text(b'"r": 4', b'"r": 4, "r": 400'), "JSON_INVALID"),
    "configuration-no-object": (with_signed_file(CONFIG, b"[]"), BAD),
    "configuration-no-json": (with_signed_file(CONFIG, b"{'r': 4}"), "JSON_INVALID"),
    "pickle-in-place-of-weights": (another_name, "FILE_UNEXPECTED"),
}
