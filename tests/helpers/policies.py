"""Scheduling policies with options that make a difference in a short run."""

from expertwire.scheduler.policy import FairShare, Fcfs, PrefixAffinity, Priority, ShortestRemaining

POLICIES = {
    "fcfs": Fcfs,
    "priority": lambda: Priority(aging=1.0),
    "shortest": lambda: ShortestRemaining(aging=10.0),
    "prefix": lambda: PrefixAffinity(window=3),
    "fair": FairShare,
}
