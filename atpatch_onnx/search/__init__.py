"""Search for triggers: is a model backdoored, toward which class, and by what?

Black box, on the artifact itself through ONNX Runtime, so that quantised, half-precision and fused
models are searched like any other.
"""
