"""NeMo and Lightning around a distillation step; no other package imports them."""
