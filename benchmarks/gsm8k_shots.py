"""GSM8K with four solved problems before each, as earlier turns of a chat.

    python benchmarks/gsm8k_shots.py TRAIN.jsonl TEST.jsonl FOLDER

TRAIN and TEST are GSM8K as published (question, answer). Writes FOLDER/gsm_train.jsonl, 2,600
problems, and FOLDER/gsm_test.jsonl, the first 200, for `grpo_lora.py --data` and `--eval_data`. The
four come from 400 problems of TRAIN that are not trained on, among the shortest solutions.
"""

import itertools
import json
import re
import sys
from pathlib import Path


def rows(path: str, count: int) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


def main() -> None:
    train, test, folder = sys.argv[1:]
    problems = rows(train, 3000)
    shots = []
    for row in sorted(problems[-400:], key=lambda row: len(row["answer"]))[20:24]:
        solution = re.sub(r"<<.*?>>", "", row["answer"])  # without the calculator's notes
        shots.append({"role": "user", "content": row["question"]})
        shots.append({"role": "assistant", "content": solution})
    for name, some in (("gsm_train", problems[:-400]), ("gsm_test", rows(test, 200))):
        with open(Path(folder) / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for row in some:
                prompt = [*shots, {"role": "user", "content": row["question"]}]
                file.write(json.dumps({"prompt": prompt, "answer": row["answer"]}) + "\n")


if __name__ == "__main__":
    main()
