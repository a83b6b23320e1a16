"""Accuracy of a submission on the passengers of labels.csv, as JSON."""

import argparse
import csv
import json
import sys


def read(path: str) -> dict[str, str]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = {"PassengerId", "Survived"} - set(rows.fieldnames or ())
        if missing:
            sys.exit(f"{path} has no column {', '.join(sorted(missing))}")
        return {row["PassengerId"].strip(): (row["Survived"] or "").strip() for row in rows}


def survived(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        sys.exit(f"Survived must be 0 or 1, not {text!r}")
    if value not in (0, 1):
        sys.exit(f"Survived must be 0 or 1, not {text!r}")
    return int(value)


parser = argparse.ArgumentParser()
parser.add_argument("--submission_file", required=True)
submitted = read(parser.parse_args().submission_file)
labels = read("labels.csv")
absent = [passenger for passenger in labels if passenger not in submitted]
if absent:
    sys.exit(f"{len(absent)} passengers of test.csv are not in the submission, the first is {absent[0]}")
right = sum(survived(submitted[passenger]) == int(label) for passenger, label in labels.items())
print(json.dumps({"accuracy": right / len(labels)}))
