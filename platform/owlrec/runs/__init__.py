"""What a run does: the functions of all stages, which take a recipe and its workspace.

They stand above the packages that do the work, since only they know the whole recipe, print, and start Ray.
"""

STAGES = ("prepare", "cohorts", "generate", "encode", "publish", "train_ctr", "evaluate")
