//! Labels and totals, had from this host and given to it.

use std::{collections::HashSet, rc::Rc};

use super::Host;
use crate::monitor::{
    api::{CommandError, StateCommand},
    state::{Imported, Judged, State},
};

impl Host {
    pub(super) async fn obey_about_state(self: Rc<Self>, command: StateCommand) {
        let cover = || self.checkpoint.cover(|| self.ports());
        match command {
            StateCommand::Export(reply) => {
                cover().await;
                let labels = self.in_force.lock().await.registry(|registry| registry.plan()).await;
                let _ = reply.send(State::of(&labels, &self.checkpoint));
            }
            StateCommand::Import { state, reply } => {
                let imported = self.import(state).await;
                cover().await;
                let _ = reply.send(imported.and_then(|imported| match self.checkpoint.trouble() {
                    Some(why) => Err(CommandError::NotApplied(why)),
                    None => Ok(imported),
                }));
            }
        }
    }

    /// Takes over labels and totals of VMs that are not served here.
    async fn import(&self, state: State) -> Result<Imported, CommandError> {
        let in_force = self.in_force.lock().await;
        let served: HashSet<_> = self.vms().iter().map(|vm| vm.label()).collect();
        let labels = in_force.registry(|registry| registry.plan()).await;
        let judged = state.judge(labels, &self.checkpoint, |label| served.contains(&label));
        let Judged { labels, numbers } = judged.map_err(|error| CommandError::Conflict(error.to_string()))?;
        let saved = in_force.registry(|registry| registry.adopt(labels)).await;
        saved.map_err(|error| CommandError::State(error.to_string()))?;
        Ok(numbers.take_over(&self.checkpoint))
    }
}
