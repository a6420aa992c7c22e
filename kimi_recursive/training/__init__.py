"""Training: the base, the phases and their arms, the loop that resumes."""

from kimi_recursive.doors import offer

__getattr__, __dir__ = offer(
    __name__,
    arms="ARMS PHASES",
    base="train_base",
    fetch="fetch_base",
    surgery="insert_cells",
    phases="train_phase",
    by_hand="run_experiment",
    experiment="ExperimentTracker",
)
