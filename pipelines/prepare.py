"""Raw data to tables: `owlrec run RECIPE --only prepare`."""

from pipelines import command

if __name__ == "__main__":
    command("run", "--only", "prepare")
