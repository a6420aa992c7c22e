# One matrix: the config's, or as a module the composition's.
include: "common.smk"
include: "base.smk"
include: "evaluate.smk"
include: "train.smk"
include: "report.smk"
