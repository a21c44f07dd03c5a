//! `state`: runtime-spec "Query State".

use super::{Context, Error, print};
use crate::cli::Id;

pub(super) fn state(context: &Context, options: &Id) -> Result<u8, Error> {
    let view = context.root.open(&options.id)?.record()?.view();
    let json = serde_json::to_string_pretty(&view)
        .map_err(|error| Error::Io("show the state", error.into()))?;
    print(&format!("{json}\n"))?;
    Ok(0)
}
