//! `list`: all containers under the state root.

use super::{Context, Error, print, table};
use crate::{
    cli::{Format, List},
    state::{Container, ContainerStatus, Record, StateError, View},
};

pub(super) fn list(context: &Context, options: &List) -> Result<u8, Error> {
    let mut views = Vec::new();
    for container in context.root.list()? {
        match container.record() {
            Ok(record) => views.push(record.view()),
            Err(StateError::Incomplete(_) | StateError::Damaged(..)) => {
                views.push(incomplete(&container));
            }
            Err(error) => tracing::warn!("{}", crate::error::chain(&error)),
        }
    }
    if options.quiet {
        let ids: String = views.iter().map(|view| format!("{}\n", view.id)).collect();
        print(&ids)?;
    } else if options.format == Format::Json {
        let json = serde_json::to_string(&views)
            .map_err(|error| Error::Io("show the list", error.into()))?;
        print(&format!("{json}\n"))?;
    } else {
        print(&rows(&views))?;
    }
    Ok(0)
}

/// A container of which there is but a name: shown, so that it can be deleted.
fn incomplete(container: &Container) -> View {
    let nobody = crate::state::ProcessIdentity {
        pid: 0,
        start_time: 0,
    };
    let mut view = Record::new(container.id(), std::path::Path::new(""), "", nobody).view();
    view.status = ContainerStatus::Stopped;
    view
}

fn rows(views: &[View]) -> String {
    let header = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    rows.extend(views.iter().map(|view| {
        vec![
            view.id.clone(),
            view.pid.to_string(),
            view.status.to_string(),
            view.bundle.display().to_string(),
            view.created.clone(),
            view.owner.clone(),
        ]
    }));
    table(&rows)
}

#[cfg(test)]
mod tests {
    #[test]
    fn an_empty_list_looks_like_runcs() {
        assert_eq!(
            super::rows(&[]),
            "ID          PID         STATUS      BUNDLE      CREATED     OWNER\n"
        );
    }
}
