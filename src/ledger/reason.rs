//! Why a frame was dropped: each dropped frame has exactly one reason, and each reason one counter.

/// Declares the reasons once: name in the code, name outside, sentence.
macro_rules! reasons {
    ($($variant:ident $name:literal $doc:literal,)*) => {
        /// Why a frame was dropped.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason {
            $(#[doc = $doc] $variant,)*
        }

        impl DropReason {
            /// Every reason, in the order of the ledger.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$variant),*];

            /// The name in statistics and metrics.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// One sentence for people.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $doc,)* }
            }
        }
    };
}

reasons! {
    Malformed "malformed" "The descriptor chain is not a frame: a loop, a bad link, a wrong direction, outside memory, or shorter than its header.",
    Runt "runt" "The frame is shorter than an Ethernet header (14 bytes).",
    Oversize "oversize" "The frame, or one segment of it, is longer than the MTU allows.",
    BadOffload "bad_offload" "The virtio-net header asks for an offload that does not fit the frame's protocols.",
    NotNegotiated "not_negotiated" "The frame needs an offload that the driver did not negotiate.",
    NoBuffers "no_buffers" "The guest offered no receive buffers in time.",
    BuffersTooSmall "buffers_too_small" "The guest's receive buffers can never hold the frame.",
    Rule "rule" "A rule says drop.",
    Default "default" "No rule matched, and the default says drop.",
    SuspectPolicy "suspect_policy" "The frame carries a suspect label, and the suspect action is drop.",
    Guard "guard" "A guard of the port says drop.",
    RateLimit "rate_limit" "The frame is above a rate limit.",
    Quarantine "quarantine" "The VM is in quarantine.",
    TapRefused "tap_refused" "The kernel refused the frame at the tap.",
    TapDown "tap_down" "The tap is down or gone.",
    RingDisabled "ring_disabled" "The ring was stopped while the frame was on its way.",
    Restart "restart" "The frame was lost in the death of a worker.",
    RestartUnmatched "restart_unmatched" "The frame was lost in the death of a worker, and its ring could not be matched.",
}

impl DropReason {
    /// How many reasons there are.
    pub const COUNT: usize = Self::ALL.len();

    /// The reason's place in the ledger.
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

#[cfg(test)]
mod tests {
    use super::DropReason;

    #[test]
    fn every_reason_has_its_own_place_and_name() {
        for (place, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), place);
            assert_eq!(DropReason::ALL.iter().filter(|r| r.name() == reason.name()).count(), 1);
        }
    }
}
