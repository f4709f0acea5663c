"""The functions of all stages, which take a recipe and its workspace.

They are above the packages that do the work: only they know the whole recipe, print, and start Ray.
"""

STAGES = ("prepare", "cohorts", "generate", "encode", "publish", "train_ctr", "evaluate")
