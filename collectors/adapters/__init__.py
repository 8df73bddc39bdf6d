"""Telemetry from other people's trainers, one file per trainer; a framework is imported only by its adapter."""
