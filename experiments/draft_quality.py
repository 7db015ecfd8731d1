"""How often a draft says what its target says: on a text, and along the target's greedy answers to prompts.

    python experiments/draft_quality.py [--model NAME] [--target DIR] [--draft DIR] [--text FILE] [--prompts FILE]
        [--whole-head]

Agreement is the share of positions with the same most likely token, with its 95% interval (bootstrap over 20 pieces of
512 tokens, or over prompts); acceptance is what greedy speculation with 3 drafts has along the answers. float32.
Without files: the package's beginning of Moby-Dick and its sixteen MT-Bench first turns. --whole-head: the draft with
all rows of the target's head, to tell what a trimmed one costs.
"""

import argparse
import json
import sys

from specsmallkv.config import ModelConfig
from specsmallkv.distill_data import cut_text
from specsmallkv.distill_report import hidden_argmax
from specsmallkv.errors import UserError
from specsmallkv.hub_text import tokens_of
from specsmallkv.intervals import bootstrap
from specsmallkv.models import ModelPair, load_pair
from specsmallkv.presets import load_model_settings
from specsmallkv.prompts import Request, read_text
from specsmallkv.tasks.distill_answers import encode
from specsmallkv.tasks.distill_held_out import LENGTH, SEQUENCES, HeldOut, along


def pair_parser(description: str) -> argparse.ArgumentParser:
    """What a command on a draft, its target and a text is asked with."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2-135m", help="a preset of conf/model")
    parser.add_argument("--target", help="instead of the preset's: a hub id or a directory")
    parser.add_argument("--draft", help="instead of the preset's: what task=distill wrote")
    parser.add_argument("--text", default="package:data/benchmarks/text.txt", help="UTF-8")
    return parser


def named_pair(given: argparse.Namespace, **settings: object) -> ModelPair:
    """The pair that the options name; settings: of conf/model, instead of the preset's. Raises UserError."""
    own = {key: value for key, value in (("target", given.target), ("draft", given.draft)) if value}
    config = ModelConfig(name=given.model, **(load_model_settings(given.model) | settings | own))
    return load_pair(config, need_draft=True)


def arguments() -> argparse.Namespace:
    parser = pair_parser(__doc__.splitlines()[0])
    parser.add_argument("--prompts", default="package:data/benchmarks/mt_bench.jsonl", help='{"prompt"} or {"turns"}')
    parser.add_argument("--whole-head", action="store_true")
    return parser.parse_args()


def load(given: argparse.Namespace) -> ModelPair:
    pair = named_pair(given, dtype="float32", linear="torch", compile=None)
    if given.whole_head:
        assert pair.draft is not None
        pair.draft.set_output_embeddings(pair.target.get_output_embeddings())
    return pair


def on_text(pair: ModelPair, source: str) -> dict[str, object]:
    pieces = cut_text(tokens_of(pair.tokenizer, "--text", source), LENGTH, SEQUENCES).long().to(pair.target.device)
    if not len(pieces):
        raise UserError(f"--text={source} has less than {LENGTH} tokens; give a longer one.")
    same = [hidden_argmax(pair.target, ids) == hidden_argmax(pair.draft, ids) for ids in pieces.split(1)]
    shares = [piece.float().mean().item() for piece in same]
    return {"agreement": sum(shares) / len(shares), "interval": bootstrap(shares), "pieces": len(shares)}


def on_answers(pair: ModelPair, source: str) -> dict[str, object]:
    rows = [json.loads(line) for line in read_text("--prompts", source).splitlines() if line.strip()]
    asked = [row["prompt"] if "prompt" in row else row["turns"][0] for row in rows]
    prompts = [encode(pair, Request(prompt=prompt)) for prompt in asked]
    assert pair.draft is not None
    agreed = HeldOut(None, prompts).agreed(pair, pair.draft)
    mean_length = sum(map(len, agreed)) / len(agreed)  # longer answers count for more
    interval = bootstrap([sum(own) / mean_length for own in agreed])
    return {**along(agreed), "interval": interval, "prompts": len(agreed)}


def main() -> None:
    given = arguments()
    try:
        pair = load(given)
        found = {"text": on_text(pair, given.text), "answers": on_answers(pair, given.prompts)}
    except UserError as error:
        sys.exit(str(error))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
