"""What a model is worth: benchmarks, metrics with intervals, calibration, the quality gate, reports. Knows no models."""
