"""What a model is worth: benchmarks, metrics with intervals, calibration, gate and reports. Knows no models."""
