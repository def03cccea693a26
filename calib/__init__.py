"""The model seen block by block, and what calibration data does inside it."""
