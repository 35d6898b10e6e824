"""The small model of `make demo-games`, and how it is trained: `recipes/train_game_model.py`."""
