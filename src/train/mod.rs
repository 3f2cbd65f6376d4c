//! Stages, optimizer, schedule, checkpoints.
