"""New events to a delta release: `owlrec refresh RECIPE`."""

from pipelines import command

if __name__ == "__main__":
    command("refresh")
