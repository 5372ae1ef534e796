"""What keeps cosmos.py, data.py, train.py and eval.py running for weeks. Those four can be followed without it."""
