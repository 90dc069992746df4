"""Token classification by transformers' Trainer alone, with full weights: what `ftray train` is held against.

    python benchmarks/plain_tagger.py '{"base": …, "train": …, "test": …, "max_length": 128, "lr": 1e-4, "epochs": 5,
        "batch_size": 32, "seed": 42, "out": …}'

Prints {"score": entity F1 on the test part, "trained": weights}. Words are parted before they are tokenised, as in
transformers' own examples; entities are counted by the same function as ftray's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

from ftray.objectives.tag_scores import figures, scores


def main() -> None:
    given = json.loads(sys.argv[1])
    train, test = sentences(given["train"]), sentences(given["test"])
    labels = sorted({tag for _, tags in train for tag in tags})
    tokenizer = AutoTokenizer.from_pretrained(given["base"])

    def encoded(rows):
        for words, tags in rows:
            made = tokenizer(words, is_split_into_words=True, truncation=True, max_length=given["max_length"])
            told, before = [], None
            for word in made.word_ids():
                told.append(labels.index(tags[word]) if word is not None and word != before else -100)
                before = word
            yield {**made, "labels": told}

    model = AutoModelForTokenClassification.from_pretrained(given["base"], num_labels=len(labels))
    trainer = Trainer(
        model,
        TrainingArguments(
            given["out"],
            learning_rate=given["lr"],
            num_train_epochs=given["epochs"],
            per_device_train_batch_size=given["batch_size"],
            per_device_eval_batch_size=given["batch_size"],
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            seed=given["seed"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=[*encoded(train)],
        data_collator=DataCollatorForTokenClassification(tokenizer),
    )
    trainer.train()
    found = trainer.predict([*encoded(test)])
    logits, right = np.asarray(found.predictions, np.float64), np.asarray(found.label_ids)
    observed = np.stack([figures(a[b >= 0], b[b >= 0], labels) for a, b in zip(logits, right, strict=True)])
    print(json.dumps({"score": scores(observed, labels)["entity_f1"], "trained": model.num_parameters()}))


def sentences(path: str) -> list[tuple[list[str], list[str]]]:
    found: list[tuple[list[str], list[str]]] = [([], [])]
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.strip():
            word, tag = line.split("\t")
            found[-1][0].append(word.strip())
            found[-1][1].append(tag.strip())
        elif found[-1][0]:
            found.append(([], []))
    return [row for row in found if row[0]]


if __name__ == "__main__":
    main()
