"""Rollout engines; each is chosen by `_target_` in `conf/engine/`."""
