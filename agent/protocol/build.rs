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
            .customize(Customize { async_all: asynchronous, gen_mod: true, ..Default::default() })
            .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
            .run()?;
    }
    Ok(())
}
