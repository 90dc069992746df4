"""Makes the built-in model: `prepare` writes text, tokenizer and random weights; `publish` packs the trained model.

python jobs/make_tiny.py prepare data/tiny
ftray train jobs/runs/builtin-tiny.yaml           # and what its head says
python jobs/make_tiny.py publish <folder of the trained model> --work data/tiny
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tiny_copies import copies
from tiny_text import conversations

HERE = Path(__file__).resolve().parent
SPECIALS = {
    "bos": "<|bos|>",
    "end": "<|end|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "system": "<|system|>",
    "pad": "<|pad|>",
}
VOCAB_SIZE = 4096
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "initializer_range": 0.02,
}  # fmt: skip

# A run of punctuation may hold single spaces, so that JSON's `": "` and `"}, {"` are one token; a digit stands alone,
# so that numbers are copied digit by digit.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+(?: [^\s\p{L}\p{N}]+)*|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str]) -> Any:
    """Byte-level BPE over `texts`: any string round-trips, and no text but the specials' own words gives a special."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIALS["bos"]
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        ),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=SPECIALS["end"],
        pad_token=SPECIALS["pad"],
        additional_special_tokens=[SPECIALS[role] for role in ("user", "assistant", "system")],
        chat_template=(HERE / "tiny_template.jinja").read_text(encoding="utf-8"),
        model_max_length=SHAPE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def untrained(folder: Path, *, tokenizer: Any, seed: int) -> int:
    """Writes a random Llama of SHAPE in fp32 beside its tokenizer; returns its number of parameters."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def read_messages(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            yield {"messages": json.loads(line)["messages"]}


def read_wikitext(path: Path) -> Iterator[dict[str, Any]]:
    """Paragraphs of WikiText as plain prose: no headings, and no sentence that lost a word to `<unk>`."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(" ="):
                continue
            sentences = [sentence for sentence in re.split(r"(?<= [.!?]) ", line.strip()) if "<unk>" not in sentence]
            text = detokenize(" ".join(sentences))
            if len(text) >= 150:
                yield {"text": text}


def detokenize(line: str) -> str:
    """`a two @-@ part , " big " ( one ) .` -> `a two-part, "big" (one).`"""
    line = re.sub(r" @([-,.])@ ", r"\1", line)
    line = re.sub(r'" ([^"]*?) "', r'"\1"', line)
    line = re.sub(r"\( ", "(", line)
    line = re.sub(r" ([.,;:!?)%]|'s\b|n't\b|'re\b|'ve\b|'ll\b|'d\b|'(?= ))", r"\1", line)
    return re.sub(r"\s+", " ", line).strip()


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = list(rows)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    return kept


def frequent_words(rows: Iterable[dict[str, Any]], least: int = 5) -> list[str]:
    counts = Counter(word for row in rows for text in texts_of(row) for word in re.findall(r"[A-Za-z]+", text))
    return sorted(word for word, count in counts.items() if count >= least)


def texts_of(row: dict[str, Any]) -> list[str]:
    return [row["text"]] if "text" in row else [message["content"] for message in row["messages"]]


def prepare(work: Path, *, sources: Path, seed: int, generated_rows: int) -> dict[str, Any]:
    """Fills `work`: <part>.train.jsonl and <part>.test.jsonl for four parts, untrained/, counts.json (returned)."""
    from tiny_publish import encoded

    work.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()

    def fresh(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            key = json.dumps(row)
            if key not in seen:
                seen.add(key)
                yield row

    parts = {  # the held-back part first, so that no training row repeats it
        "sgd": [read_messages(sources / f"corpus/sgd.{split}.jsonl.gz") for split in ("test", "train")],
        "coffee": [read_messages(sources / f"taskmaster4/dialogs.{split}.jsonl") for split in ("test", "train")],
        "wiki": [
            islice(read_wikitext(sources / "corpus/wikitext2.test.txt.gz"), 300),
            read_wikitext(sources / "corpus/wikitext2.valid.txt.gz"),
        ],
        "generated": [conversations(seed=seed + 1, count=400), conversations(seed=seed, count=generated_rows)],
    }
    rows = {
        f"{part}.{split}": write_rows(work / f"{part}.{split}.jsonl", fresh(source))
        for part, pair in parts.items()
        for split, source in zip(("test", "train"), pair, strict=True)
    }
    words = frequent_words(rows["sgd.train"])
    write_rows(work / "copies.test.jsonl", fresh(copies(words, seed=seed + 12, count=300)))
    write_rows(work / "copies.train.jsonl", fresh(copies(words, seed=seed + 11, count=40_000)))
    trained_on = [name for name in rows if name.endswith(".train")]
    tokenizer = train_tokenizer(text for name in trained_on for row in rows[name] for text in texts_of(row))
    counts: dict[str, Any] = {"parameters": untrained(work / "untrained", tokenizer=tokenizer, seed=seed)}
    for name in rows:
        lengths = [len(encoded(tokenizer, row)) for row in rows[name]]
        chars = sum(len(text) for row in rows[name] for text in texts_of(row))
        counts[name] = {"rows": len(lengths), "tokens": sum(lengths), "longest": max(lengths), "chars": chars}
    counts["train_tokens"] = sum(counts[name]["tokens"] for name in trained_on)
    (work / "counts.json").write_text(json.dumps(counts, indent=1), encoding="utf-8")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="text, tokenizer and random weights into a work folder")
    first.add_argument("work", type=Path)
    first.add_argument(
        "--sources", type=Path, default=HERE.parent.parent / "shared/data", help="folder with the public data sets"
    )
    first.add_argument("--seed", type=int, default=20)
    first.add_argument("--generated-rows", type=int, default=36000)
    second = commands.add_parser("publish", help="the trained model, packed as builtin:tiny with its card")
    second.add_argument("trained", type=Path, help="folder with the trained model's config.json and safetensors")
    second.add_argument("--work", type=Path, required=True, help="the folder that prepare filled")
    second.add_argument("--into", type=Path, default=HERE.parent / "ftray/models/tiny")
    options = parser.parse_args()
    if options.command == "prepare":
        counts = prepare(
            options.work, sources=options.sources, seed=options.seed, generated_rows=options.generated_rows
        )
        print(json.dumps(counts, indent=1))
    else:
        from tiny_publish import publish

        recipes = [HERE / "runs" / f"{name}.yaml" for name in ("builtin-tiny", "builtin-tiny-copies")]
        publish(options.trained, work=options.work, into=options.into, recipes=recipes)
        print((options.into / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
