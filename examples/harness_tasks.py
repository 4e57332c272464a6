"""Three tasks for lm-evaluation-harness out of the held-out documents of a corpus.

    python examples/harness_tasks.py FOLDER [--corpus stdlib] [--items 40]

FOLDER gets NAME_rolling (perplexity of the beginnings of documents), NAME_next (which of four lines
of a document comes next) and NAME_line (the rest of a line, written until its end), each a YAML
file and its data. They are of the test split, which no datastore of the same corpus has. Then:

    lm_eval --include_path FOLDER --tasks NAME_rolling,NAME_next,NAME_line \
        --model knnext --model_args pretrained=MODEL,datastore=STORE,max_length=1024
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from knnext.corpus import Document, load_corpus

#: Characters that stand before what is asked, and of a document that is read for its perplexity.
CONTEXT, READ = 800, 3000
CHOICES = 4

TASKS = {
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
""",
    "next": """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: ""
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
""",
    "line": """output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{rest}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false}
filter_list:
  - name: stripped
    filter: [{function: remove_whitespace}, {function: take_first}]
metric_list:
  - {metric: exact_match}
""",
}


WANTED = {
    "rolling": f"texts of {READ // 2} characters are wanted",
    "next": f"{CHOICES} lines of 20 to 100 characters, behind eight others, are wanted",
    "line": "lines of 20 to 100 characters, behind eight others, are wanted",
}


def rolling(document: Document, draw: random.Random) -> dict[str, object] | None:
    return {"text": document.text[:READ]} if len(document.text) >= READ // 2 else None


def next_line(document: Document, draw: random.Random) -> dict[str, object] | None:
    """The line that follows, among others of the document that are indented as it is."""
    lines = document.text.splitlines()
    place = place_in(lines, draw)
    if place is None:
        return None
    right = lines[place]
    others = sorted(
        {
            line
            for line in lines
            if len(line) >= 20 and indent(line) == indent(right) and line.strip() != right.strip()
        }
    )
    if len(others) < CHOICES - 1:
        return None
    choices = [right, *draw.sample(others, CHOICES - 1)]
    draw.shuffle(choices)
    return {"context": before(lines, place), "choices": choices, "gold": choices.index(right)}


def rest_of_line(document: Document, draw: random.Random) -> dict[str, object] | None:
    lines = document.text.splitlines()
    place = place_in(lines, draw)
    if place is None:
        return None
    words = lines[place].split()
    if len(words) < 3:
        return None
    rest = " ".join(words[draw.randrange(1, len(words)) :])
    given = lines[place].rstrip()[: -len(rest)].rstrip()
    if not lines[place].rstrip().endswith(rest) or not given.strip():
        return None  # written with more than one space
    return {"context": before(lines, place) + given, "rest": rest}


MAKERS = {"rolling": rolling, "next": next_line, "line": rest_of_line}


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def place_in(lines: list[str], draw: random.Random) -> int | None:
    """A line of some length with some text before it."""
    places = [i for i in range(8, len(lines)) if 20 <= len(lines[i]) <= 100]
    return draw.choice(places) if places else None


def before(lines: list[str], place: int) -> str:
    text = "\n".join(lines[:place])[-CONTEXT:]
    return text.partition("\n")[2] + "\n"  # from the beginning of a line


def items(documents: list[Document], task: str, count: int) -> Iterator[dict[str, object]]:
    """Up to ``count``, document by document in turn; of each one only once for rolling."""
    draw = random.Random(0)
    found = 0
    for _ in range(1 if task == "rolling" else 4 * count):
        for document in documents:
            item = MAKERS[task](document, draw)
            if item is not None and found < count:
                found += 1
                yield item
        if found >= count:
            return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", default="stdlib")
    parser.add_argument("--items", type=int, default=40)
    given = parser.parse_args()
    documents = load_corpus(given.corpus).test
    stem = re.sub(r"\W+", "_", Path(given.corpus).stem)  # a comma would part two tasks
    given.folder.mkdir(parents=True, exist_ok=True)
    for task, body in TASKS.items():
        name = f"{stem}_{task}"
        data = (given.folder / f"{name}.jsonl").resolve()
        found = [json.dumps(item) for item in items(documents, task, given.items)]
        if not found:
            print(f"{name}: left out, {WANTED[task]}, and no document held out is so")
            continue
        data.write_text("\n".join(found) + "\n", encoding="utf-8")
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs: {json.dumps({'data_files': {'test': str(data)}})}\n"
        (given.folder / f"{name}.yaml").write_text(head + files + body, encoding="utf-8")
        print(f"{name}: {len(found)} items, in {data}")


if __name__ == "__main__":
    main()
