//! Generates the messages and, for each side that is asked for, its half of the service.
use std::{env, error::Error, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for (directory, asynchronous) in [("client", false), ("server", true)] {
        let directory = out.join(directory);
        fs::create_dir_all(&directory)?;
        Codegen::new()
            .out_dir(&directory)
            .input("proto/agent.proto")
            .include("proto")
            .rust_protobuf()
            .customize(Customize {
                async_all: asynchronous,
                ..Default::default()
            })
            .rust_protobuf_customize(ProtobufCustomize::default())
            .run()?;
    }
    // Generated files begin with inner attributes, which only a file of a module may: hence this
    // index of modules, included as a whole. Both halves of the service use the same messages.
    fs::write(
        out.join("mod.rs"),
        "#[path = \"client/agent.rs\"]\npub mod agent;\n\
         #[cfg(feature = \"client\")]\n#[path = \"client/agent_ttrpc.rs\"]\npub mod client;\n\
         #[cfg(feature = \"server\")]\n#[path = \"server/agent_ttrpc.rs\"]\npub mod server;\n",
    )?;
    Ok(())
}
