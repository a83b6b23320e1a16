"""Accuracy of a submission on the pictures of labels.csv (index, label), as JSON."""

import argparse
import csv
import json
import sys

parser = argparse.ArgumentParser()
parser.add_argument("--submission_file", required=True)
path = parser.parse_args().submission_file
with open(path, newline="", encoding="utf-8-sig") as file:
    rows = csv.DictReader(file)
    if "label" not in (rows.fieldnames or ()):
        sys.exit(f"{path} has no column label")
    submitted = [(row["label"] or "").strip() for row in rows]
with open("labels.csv", newline="") as file:
    labels = [(int(row["index"]), int(row["label"])) for row in csv.DictReader(file)]
with open("count.json") as file:
    count = json.load(file)
if len(submitted) != count:
    sys.exit(f"{path} has {len(submitted)} labels for {count} pictures")
try:
    right = sum(float(submitted[index]) == label for index, label in labels)
except ValueError as error:
    sys.exit(f"a label is no number: {error}")
print(json.dumps({"accuracy": right / len(labels)}))
