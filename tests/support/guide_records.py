"""Records as the guide on experiment logs has them, its comments taken out."""

from typing import Any

BASELINE: dict[str, Any] = {
    "branch": "main",
    "commit": "b77f986",
    "timestamp": "2025-10-21T00:00:00Z",
    "experiment": "6level_initial",
    "metrics": {
        "accuracy": 0.5322, "balance_delta": 0.3997, "cycle_loss": 1.53, "cycle_loss_upper": None,
        "cycle_loss_lower": None, "cycle_loss_cross": None, "q_neural": None,
        "temperature_gradient": None, "lawson_criterion": None, "beta_limit": None,
    },
    "config": {
        "variant": "6level_full", "epochs": 10, "batch_size": 64, "learning_rate": 0.0001,
        "cycle_weight": 0.01, "diversity_weight": 0.0, "pool_ratio": 0.5, "dropout": 0.1,
        "node_features": 64, "num_relations": 16, "num_classes": 2,
    },
    "notes": "Human-readable experiment description",
}  # fmt: skip

TRAINING: dict[str, Any] = {
    "timestamp": "2025-10-21T00:00:00.000000",
    "run_data": {
        "run_id": "baseline_single_pass_20251021",
        "domain": "planning",
        "status": "completed",
        "dataset_config": {
            "domain": "planning", "split": "train", "total_size": 2858, "train_size": 2000,
            "val_size": 429, "label_balance_class_0": 0.5, "label_balance_class_1": 0.5,
            "domain_params": {}, "is_balanced": True,
        },
        "hyperparameters": {
            "epochs": 10, "batch_size": 64, "learning_rate": 0.0001, "seed": 42,
            "cycle_loss_weight": 0.01, "patience": 20, "min_delta": 0.001, "grad_clip_norm": None,
            "pool_ratio": 0.5, "use_dual_pass": False, "fusion_mode": None,
        },
        "architecture": {
            "variant": "baseline_single_pass",
            "description": "3-level hierarchy with single bottom-up pass",
            "num_levels": 3, "passes": 1, "fusion_weights": None,
        },
        "metrics_history": [],
        "best_val_loss": 0.793800413608551,
        "best_val_accuracy": 0.435,
        "best_epoch": None,
        "final_metrics": {
            "accuracy": 0.435, "accuracy_class_0": 0.004424778761061947,
            "accuracy_class_1": 0.9942528735632183, "class_balance_delta": 0.9898280948021564,
            "task_loss": 0.6968503168651036, "cycle_loss": 0.793800413608551,
        },
        "training_time_seconds": 33.966574,
        "start_time": "2025-10-21T00:00:00Z",
        "end_time": "2025-10-21T00:00:34Z",
        "pid": None, "log_path": None, "checkpoint_dir": None,
        "experiment_type": "dual_pass_validation",
        "error_message": None,
        "findings": "Human-readable summary of results",
        "counterfactual_accuracy": None, "intervention_accuracy": None, "hits_at_10": None,
        "mrr": None, "analogical_reasoning_acc": None, "goal_achievement_rate": None,
        "temporal_ordering_acc": None,
        "current_epoch": 0, "is_stuck": False, "should_early_stop": False, "has_converged": False,
        "has_task_mismatch": False,
    },
}  # fmt: skip


def training(
    run_id: str, /, timestamp: str = "2025-10-21T00:00:00Z", **data: Any
) -> dict[str, Any]:
    """A short record of a completed run, with other or more fields."""
    usual = {"run_id": run_id, "domain": "planning", "status": "completed"}
    return {"timestamp": timestamp, "run_data": {**usual, **data}}


def baseline(experiment: str, /, timestamp: str = "2025-10-21T00:00:00Z", **more: Any) -> dict:
    """A short record of an evaluation."""
    usual = {"branch": "main", "commit": "b77f986", "metrics": {}}
    return {**usual, "timestamp": timestamp, "experiment": experiment, **more}
