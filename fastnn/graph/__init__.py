"""Whole models as graphs of torch's ops: captured, brought to one spelling, fused, laid out, and lowered to fastnn's ops."""
