//! Learning rate as a pure function of the step.

use serde::{Deserialize, Serialize};

/// The shape of the learning rate over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Always the same.
    Constant,
    /// Linear warm-up over `warmup_steps`, then a cosine to `min_lr` at the last step.
    Plain,
    /// LAVIS' `linear_warmup_cosine_lr`.
    ///
    /// PARITY: its warm-up takes the step *within the epoch*, so with epochs shorter than the warm-up the rate is a sawtooth that
    /// never reaches its top before the cosine begins (reference, section 5.1).
    Official,
}

/// A schedule with its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The shape.
    pub kind: ScheduleKind,
    /// The top.
    pub learning_rate: f64,
    /// The end.
    pub min_lr: f64,
    /// The start of the warm-up.
    pub warmup_lr: f64,
    /// Steps of the warm-up.
    pub warmup_steps: u64,
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// Epochs at most: where the cosine ends.
    pub max_epochs: u64,
}

impl Schedule {
    /// Learning rate of `step`, counted from 0.
    pub fn lr(&self, step: u64) -> f64 {
        let total = self.steps_per_epoch * self.max_epochs;
        let cosine = |done: f64| {
            let falling = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
            (self.learning_rate - self.min_lr) * falling + self.min_lr
        };
        let warming = |step: u64| {
            let rise = (self.learning_rate - self.warmup_lr) * step as f64 / self.warmup_steps.max(1) as f64;
            (self.warmup_lr + rise).min(self.learning_rate)
        };
        match self.kind {
            ScheduleKind::Constant => self.learning_rate,
            ScheduleKind::Official if step < self.warmup_steps => warming(step % self.steps_per_epoch),
            ScheduleKind::Official => cosine(step as f64 / total as f64),
            ScheduleKind::Plain if step < self.warmup_steps => warming(step),
            ScheduleKind::Plain => {
                let rest = total.saturating_sub(self.warmup_steps).max(1);
                cosine(((step - self.warmup_steps) as f64 / rest as f64).min(1.0))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    const OFFICIAL: Schedule = Schedule {
        kind: ScheduleKind::Official,
        learning_rate: 1e-3,
        min_lr: 8e-5,
        warmup_lr: 1e-5,
        warmup_steps: 200,
        steps_per_epoch: 50,
        max_epochs: 200,
    };

    #[test]
    fn golden_official() {
        let bytes = include_bytes!("../../tests/fixtures/golden/collab-optim/golden.safetensors");
        let file = SafeTensors::deserialize(bytes).unwrap();
        let at: Vec<i64> = bytemuck::pod_collect_to_vec(file.tensor("sched.epoch_step").unwrap().data());
        let lr: Vec<f64> = bytemuck::pod_collect_to_vec(file.tensor("sched.lr").unwrap().data());
        assert_eq!(lr.len(), 24);
        for (at, want) in at.chunks(2).zip(lr) {
            let got = OFFICIAL.lr((at[0] * 50 + at[1]) as u64);
            assert!((got - want).abs() < 1e-12, "epoch {} step {}: {got} against {want}", at[0], at[1]);
        }
    }

    #[test]
    fn plain_rises_once_and_falls_to_the_minimum() {
        let plain = Schedule { kind: ScheduleKind::Plain, ..OFFICIAL };
        assert_eq!((plain.lr(0), plain.lr(200)), (1e-5, 1e-3));
        assert!((plain.lr(100) - 5.05e-4).abs() < 1e-12);
        assert!((plain.lr(10_000) - 8e-5).abs() < 1e-12 && plain.lr(20_000) == plain.lr(10_000));
    }
}
