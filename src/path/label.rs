//! Which VM a frame belongs to.
//!
//! A label comes from the policy of the port whose virtqueue the frame came through, never from a byte of
//! the frame.

use crate::{label::FrameLabel, policy::Policy};

/// A frame that carries its VM's label. `F` is a [`Chain`](super::chain::Chain) in transmit, and a
/// [`TapFrame`](super::place::TapFrame) in receive.
#[derive(Debug)]
#[must_use]
pub struct Labelled<F> {
    frame: F,
    label: FrameLabel,
}

/// The only way to make a [`Labelled`].
pub const fn attach<F>(frame: F, policy: &Policy) -> Labelled<F> {
    Labelled { frame, label: policy.label_of_frame() }
}

impl<F> Labelled<F> {
    pub(super) fn into_parts(self) -> (F, FrameLabel) {
        (self.frame, self.label)
    }
}
