"""Women survive, men do not."""

import csv

with open("data/test.csv", newline="") as file:
    passengers = list(csv.DictReader(file))
with open("submission.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["PassengerId", "Survived"])
    writer.writerows([row["PassengerId"], int(row["Sex"] == "female")] for row in passengers)
