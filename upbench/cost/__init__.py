"""What a method costs: parameters, multiply-accumulates, latency, memory."""

from upbench._lazy import lazily

__getattr__, __dir__ = lazily(__name__, {"upbench.cost.measure": "Cost DTYPES cost_key hardware"})
