"""A tiny random target and draft per architecture, float32 on CPU, whose greedy text is not degenerate."""

import gc
import logging
import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton, which asks then
    os.environ["TRITON_INTERPRET"] = "1"

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specsmallkv.config import CONFIG_DIR
from specsmallkv.policies import Policy
from specsmallkv.presets import build, load_policy

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
VOCAB = 96


def tiny_model(
    architecture: str = "llama",
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    vocab: int = VOCAB,
) -> PreTrainedModel:
    config_class, model_class = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    options = {"head_dim": 8} if architecture != "qwen2" else {}
    if architecture == "mistral":
        options["sliding_window"] = None  # `test_windows.py` has models with windows
    config = config_class(
        vocab_size=vocab,
        hidden_size=8 * heads,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        initializer_range=0.35,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
        **options,
    )
    return model_class(config).eval()


def compose_run(*overrides: str) -> tuple:
    """Configuration and task as the command line would compose them."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        node = compose("config", list(overrides))
    config = OmegaConf.to_object(node)
    config.policy, task = build(node.policy, "policy"), build(node.task, "task")
    return config, task


def policy_of(name: str, **settings: object) -> Policy:
    """A preset; "specsmallkv in 4 bits": with its critical tokens packed."""
    name, _, bits = name.partition(" in ")
    return load_policy(name, **settings | ({"key_bits": int(bits[0]), "value_bits": int(bits[0])} if bits else {}))


def run_task(*overrides: str) -> dict:
    """The record of a task, without the command line."""
    config, task = compose_run(*overrides)
    return task.run(config)


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage():
    """Every run collects garbage, and would look through all of torch and transformers for it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def a_command_takes_its_log_along():
    """Hydra leaves its handlers at the root logger: another test's warning would go to a directory that is gone."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for left in set(root.handlers) - set(handlers):
        root.removeHandler(left)
        left.close()
    root.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # tiny tensors gain nothing from a second, and lose to it on a busy machine


@pytest.fixture(scope="session")
def target():
    return tiny_model(seed=1)


@pytest.fixture(scope="session")
def draft(target):
    """The target's first two of three layers: agrees with it often enough that some drafts pass and some do not."""
    model = tiny_model(layers=2, seed=1)
    state = {k: v for k, v in target.state_dict().items() if k in model.state_dict()}
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="session")
def prompt():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, VOCAB, (150,), generator=generator).tolist()


@pytest.fixture(autouse=True, scope="session")
def drafts_are_believed():
    """Random drafts predict nothing: heads would fall back on their history, and most tests would not see the rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specsmallkv.matching.HISTORY_MARGIN", 2.0)
        patch.setattr("specsmallkv.matching.HeadMap.mean_similarity", 1.0)
        yield
